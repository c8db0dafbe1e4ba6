import sys

from gemmakit.cli import main

sys.exit(main())
