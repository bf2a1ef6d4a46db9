"""The checker of shapes and types at run time, in tests only: beartype, with int taken where float is asked for."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
