import sys

from gpl_fast.cli import main

sys.exit(main())
