import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_anyexperts.data.decoder_process import DecoderDied, DecoderProcess
from megatron_anyexperts.data.media_forms import MediaError
from tests.unit.data import deadly


@pytest.fixture
def decoder():
    process = DecoderProcess(seconds=30)
    yield process
    process.close()


def test_results_and_errors_come_back_with_their_place(decoder):
    assert decoder.run(len, b"abc") == 3
    with pytest.raises(MediaError, match="a reason: a detail"):
        decoder.run(deadly.refuse, "a reason", "a detail")
    with pytest.raises(ZeroDivisionError) as caught:
        decoder.run(deadly.divide, 1, 0)
    assert caught.value.place.startswith("deadly.py:")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_call_that_kills_the_child_is_named_and_the_next_one_works(decoder, number):
    with pytest.raises(DecoderDied, match=f"decoding kills the process: signal {number:d} .{number.name}"):
        decoder.run(deadly.die, int(number))
    assert decoder.run(len, b"abc") == 3


def test_a_child_that_somebody_else_killed_costs_nothing(decoder):
    first = decoder.run(os.getpid)
    os.kill(first, signal.SIGKILL)
    assert decoder.run(os.getpid) != first


def test_a_call_without_end_is_given_up(decoder):
    assert decoder.run(len, b"abc") == 3
    decoder._seconds = 0.5  # too little for a start of the child
    with pytest.raises(DecoderDied, match="decoding does not end: stopped after 0.5 s"):
        decoder._run(time.sleep, (60,))


def test_a_call_that_takes_all_memory_is_refused_and_the_child_lives_on(decoder):
    child = decoder.run(os.getpid)
    with pytest.raises(MemoryError):
        decoder.run(bytes, 2**35)
    assert decoder.run(os.getpid) == child


def test_a_forked_process_uses_a_child_of_its_own(decoder):
    ours = decoder.run(os.getpid)
    read, write = os.pipe()
    if (forked := os.fork()) == 0:
        os.write(write, str(decoder.run(os.getpid)).encode())
        os._exit(0)
    os.waitpid(forked, 0)
    assert int(os.read(read, 99)) != ours == decoder.run(os.getpid)


def test_the_child_ends_with_its_parent_even_while_it_is_busy():
    command = (
        "import os, time, threading\n"
        "from megatron_anyexperts.data.decoder_process import DecoderProcess\n"
        "decoder = DecoderProcess()\n"
        "print(decoder.run(os.getpid), flush=True)\n"
        "decoder.run(time.sleep, 600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([child], timeout=20)[1] == []
