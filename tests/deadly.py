"""A picture whose decoding dies of a segmentation fault, in processes that load this at their start."""

MARK = b"this picture kills its decoder"
SITECUSTOMIZE = f"""
import ctypes
import PIL.JpegImagePlugin as plugin

decode = plugin.JpegImageFile.load_prepare

def load_prepare(self):
    if {MARK!r} in self.fp.getvalue():
        ctypes.string_at(0)  # a read from address 0: SIGSEGV
    return decode(self)

plugin.JpegImageFile.load_prepare = load_prepare
"""
