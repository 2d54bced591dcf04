"""Dynamic expert slots: router, virtual experts, dispatch and their controllers. Knows only torch and Megatron-Core."""
