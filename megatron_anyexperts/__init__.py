"""Multimodal mixture-of-experts pretraining in which every token gets as many experts as it needs."""
