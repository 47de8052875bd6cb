"""``python -m meta_trainer``, also as the module of ``accelerate launch -m``."""

import sys

from meta_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
