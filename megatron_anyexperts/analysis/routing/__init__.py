"""What experts do, from routing traces: pure functions over arrays, one quantity a file.

Shapes: N tokens, L mixture layers, E real experts, P samples (documents, prompts), G groups of samples or of tokens.
"""
