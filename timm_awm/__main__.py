import sys

from timm_awm_cli.main import main

sys.exit(main())
