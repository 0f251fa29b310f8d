"""The command `timm-awm`, one file a command. A package of its own, since importing timm_awm imports torch."""
