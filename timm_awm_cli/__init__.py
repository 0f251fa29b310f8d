"""The command line of timm_awm, one module a command."""
