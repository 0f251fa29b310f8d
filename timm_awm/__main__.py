"""`python -m timm_awm`: timm-awm, in a process that has not imported torch yet."""
import os
import sys

os.execv(sys.executable, [sys.executable, '-m', 'timm_awm_cli', *sys.argv[1:]])
