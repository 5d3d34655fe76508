"""Speech from espeak-ng, in a process of its own: sentences come in on standard input, audio goes out on standard output.

    python recipes/quickstart/espeak.py en-us+m3

First comes a JSON line with the sample rate. Then, for every JSON line read with `text`, `rate` (words a minute), `pitch` and `range` (0 to
100, 50 is usual), the number of bytes (4 bytes, little endian) and so many bytes of 16 bit samples. Ends when standard input does.

The library and its voices come with the wheel espeakng-loader. They are under the GPL, which is why nothing of k2ssl loads them: only this
program does, and it shares no process with anything else. That also makes the audio repeatable: the library's noise and flutter go on from
sentence to sentence and nothing but a new process sets them back, so that a voice's n-th sentence depends on those before it alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_SYNCHRONOUS, _RETURN_ERRORS, _UTF8 = 2, 0x8000, 1  # as in espeak-ng's speak_lib.h
_PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library with one voice, such as `en-us+m3`: accent and variant.

    Attributes:
        sample_rate: of what `say` returns, Hz.

    Raises:
        ValueError: the library does not start, or has no such voice.
    """

    def __init__(self, voice: str) -> None:
        import espeakng_loader

        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        data = Path(espeakng_loader.get_data_path())
        if not (data / "voices" / "!v" / voice.partition("+")[2]).is_file():
            raise ValueError(f"espeak-ng has no voice {voice}")  # by itself it would leave out the variant and say nothing
        os.chdir(data)  # because it cuts off paths of more than 160 characters
        self._pieces: list[bytes] = []
        self._callback = _Callback(self._take)  # kept here, the library holds no reference
        self.sample_rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, b".", _RETURN_ERRORS))
        if self.sample_rate <= 0:
            raise ValueError(f"espeak-ng does not start with the voices in {data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it is the time of day otherwise
        self._library.espeak_SetSynthCallback(self._callback)
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice}")

    def say(self, text: str, rate: int, pitch: int, range: int) -> bytes:
        """16 bit samples of `text`; parameters as in the module's docstring."""
        self._pieces.clear()
        for name, value in (("rate", rate), ("pitch", pitch), ("range", range)):
            self._library.espeak_SetParameter(_PARAMETERS[name], value, 0)
        content = text.encode()
        status = self._library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, 1, 0, _UTF8, None, None)
        if status:
            raise ValueError(f"espeak-ng refused {text!r} (status {status})")
        return b"".join(self._pieces)

    def _take(self, samples: Any, number: int, events: Any) -> int:
        if samples and number > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * number))
        return 0


def main() -> int:
    try:
        espeak = Espeak(sys.argv[1])
        answer = sys.stdout.buffer
        answer.write(f"{json.dumps({'sample_rate': espeak.sample_rate})}\n".encode())
        answer.flush()
        for line in sys.stdin:
            audio = espeak.say(**json.loads(line))
            answer.write(len(audio).to_bytes(4, "little") + audio)
            answer.flush()
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
