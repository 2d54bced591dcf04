"""Stamp scenes: pictures of known content, with questions whose answers are right by construction."""
