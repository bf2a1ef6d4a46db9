"""``python -m dpo_jax`` is ``dpo-jax``."""

import sys

from dpo_jax.cli import main

sys.exit(main())
