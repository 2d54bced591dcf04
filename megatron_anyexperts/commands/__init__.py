"""Entry points of the tools, a module each."""

from megatron_anyexperts.console import quiet_imports

quiet_imports()
