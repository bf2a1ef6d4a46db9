"""Run the ``dpo-jax`` command as ``python -m dpo_jax``."""

import sys

from dpo_jax.cli import main

sys.exit(main())
