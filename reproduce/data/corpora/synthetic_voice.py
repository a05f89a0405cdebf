"""A small source-filter speech synthesizer: a sequence of sounds to a waveform.

Each letter is one to three *phases*: formant targets, and how strongly the glottis, breath (noise
at the glottis) and hiss (noise at a constriction) sound. Formants glide from target to target:
that is the coarticulation. The glottis gives a train of Rosenberg pulses. Glottis and hiss
are cut into frames, filtered by multiplication with the frame's response, levelled and
overlap-added: a second of speech costs a few hundred short FFTs. Terms and typical values: Klatt
(1980), "Software for a cascade/parallel formant synthesizer"; glottal pulse: Rosenberg (1971),
type C.

Shapes: S phases, N samples, F frames, K frequency bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import convolve1d, uniform_filter1d
from scipy.signal import lfilter, oaconvolve

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

RATE = 16_000
HOP = 160
WINDOW = 2 * HOP
FFT = 4 * HOP
"""Frame length plus room for the filter's tail: 20 ms each."""

FINAL = 0.5
"""Seconds before a pause in which a phrase ends as phrases do: pitch and loudness fall, and the
voice turns to breath."""

FINAL_FALL = 0.8
"""By which the ln of the pitch falls there."""
FINAL_FADE = 18.0
"""dB by which sounds fade there, before levelling."""
FINAL_BREATH, FINAL_PULSES = 0.8, 0.9
"""Shares of the voice's amplitude: breath that is added there, pulses that are lost."""

STRESS = 3.0
"""dB: words differ by up to that, before levelling."""

LEVELLING = 0.5
"""Share of the dB under the loudest 0.1 s that is taken away, as a recording chain evens levels: of
recorded frames half lie within 10 dB of the loudest in 5 s, pauses and all."""

NEUTRAL = 900.0
"""Hz: nasal pole, and where the antiresonance lies (cancelling it) unless the sound is nasal."""


class Phase(NamedTuple):
    """A stretch of steady targets. Frequencies in Hz for a tract length factor of 1."""

    ms: float
    f1: float = 500.0
    f2: float = 1500.0
    f3: float = 2500.0
    voice: float = 0.0
    breath: float = 0.0
    hiss: float = 0.0
    centre: float = 3000.0
    width: float = 1000.0
    zero: float = NEUTRAL


def _stop(f1: float, f2: float, f3: float, voice: float, centre: float) -> tuple[Phase, ...]:
    """A closure (with a voice bar or silent), then a burst."""
    burst = 0.55 if voice else 0.9
    return (
        Phase(48, 220 if voice else f1, f2, f3, voice=voice),
        Phase(26, f1, f2, f3, voice=voice, breath=0.1, hiss=burst, centre=centre, width=centre / 3),
    )


SOUNDS: dict[str, tuple[Phase, ...]] = {
    "A": (Phase(145, 800, 1300, 2550, voice=1.0),),
    "E": (Phase(125, 540, 1900, 2550, voice=1.0),),
    "I": (Phase(120, 290, 2300, 3050, voice=1.1),),
    "O": (Phase(140, 520, 850, 2450, voice=1.0),),
    "U": (Phase(125, 320, 1080, 2250, voice=1.1),),
    "Y": (Phase(110, 290, 1750, 2150, voice=1.1),),
    "W": (Phase(105, 270, 620, 2250, voice=0.8),),
    "L": (Phase(105, 370, 1050, 3000, voice=0.65),),
    "R": (Phase(105, 400, 1250, 1600, voice=0.75),),
    "M": (Phase(110, 260, 1050, 2200, voice=0.6, zero=600),),
    "N": (Phase(110, 260, 1650, 2600, voice=0.6, zero=1500),),
    "H": (Phase(95, 560, 1500, 2500, breath=0.45),),
    "S": (Phase(130, 320, 1650, 2600, hiss=1.0, centre=6200, width=900),),
    "Z": (Phase(115, 280, 1650, 2600, voice=0.4, hiss=0.55, centre=6200, width=900),),
    "F": (Phase(125, 320, 1100, 2200, hiss=0.4, centre=4500, width=4000),),
    "V": (Phase(105, 280, 1100, 2200, voice=0.5, hiss=0.25, centre=4500, width=4000),),
    "X": (
        Phase(45, 300, 2000, 2500),
        Phase(90, 320, 1800, 2500, hiss=0.9, centre=4600, width=500),
    ),
    "C": (
        Phase(45, 300, 1900, 2600),
        Phase(90, 300, 1900, 2600, hiss=0.9, centre=3000, width=500),
    ),
    "J": (
        Phase(45, 220, 1900, 2600, voice=0.45),
        Phase(80, 280, 1900, 2600, voice=0.5, hiss=0.6, centre=3000, width=500),
    ),
    "P": _stop(300, 800, 2100, 0.0, 800),
    "T": _stop(300, 1750, 2700, 0.0, 4600),
    "K": _stop(300, 2100, 2400, 0.0, 1900),
    "B": _stop(250, 800, 2100, 0.45, 800),
    "D": _stop(250, 1750, 2700, 0.45, 4600),
    "G": _stop(250, 2100, 2400, 0.45, 1900),
    "Q": (
        Phase(45, 300, 1200, 2200),
        Phase(25, 300, 900, 2200, breath=0.1, hiss=0.9, centre=1200, width=250),
        Phase(55, 290, 640, 2200, voice=0.5, breath=0.3),
    ),
    "'": (Phase(45, 600, 1300, 1900, voice=0.12, breath=0.08),),
    "again": (Phase(28, voice=0.08),),
    " ": (Phase(60, voice=0.3),),
    "pause": (Phase(350),),
}
"""Letters; and the dip between two equal letters, the murmur between words that are spoken in one
breath, the pause."""

PHASES: tuple[Phase, ...] = tuple(phase for sound in SOUNDS.values() for phase in sound)
PHASES_OF: dict[str, tuple[int, ...]] = {}
for _name, _sound in SOUNDS.items():
    _first = sum(map(len, PHASES_OF.values()))
    PHASES_OF[_name] = tuple(range(_first, _first + len(_sound)))
PAUSE = PHASES_OF["pause"][0]
_WORD_ENDS = (PHASES_OF[" "][0], PAUSE)
_TABLE = np.array(PHASES, dtype=np.float32)


@dataclass(frozen=True)
class Voice:
    """What makes a speaker: pitch in Hz before phrases end, formant and duration factor, breath."""

    pitch: float
    tract: float
    tempo: float
    breath: float


def _rosenberg(steps: int = 2048, opening: float = 0.40, closing: float = 0.14) -> Floats:
    """One period of the derivative of Rosenberg's glottal flow, of unit RMS."""
    t = np.arange(steps) / steps
    rise = np.sin(np.pi * t / opening) * 0.5 * np.pi / opening
    fall = -np.sin(0.5 * np.pi * (t - opening) / closing) * 0.5 * np.pi / closing
    pulse = np.where(t < opening, rise, np.where(t < opening + closing, fall, 0.0))
    pulse -= pulse.mean()
    return np.asarray(pulse / np.sqrt(np.mean(pulse**2)), dtype=np.float32)


_GLOTTIS = _rosenberg()
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
_GLIDE = np.hanning(9)[1:-1].astype(np.float32) / 4.0
"""Formants reach a new target in about 70 ms: frames of 10 ms, weights that sum to 1."""
_BINS = np.arange(FFT // 2 + 1) * (RATE / FFT)
_DELAY = np.exp(-2j * np.pi * _BINS / RATE).astype(np.complex64)


def synthesize(phases: Ints, samples: Ints, voice: Voice, rng: np.random.Generator) -> Floats:
    """A waveform of exactly ``samples.sum()`` samples at 16 kHz.

    Args:
        phases: [S] indices into ``PHASES``.
        samples: [S] the length of each.
        voice: the speaker.
        rng: noise, stress of words, pitch movement, room, level.

    Returns:
        [N] float32, RMS 0.05 to 0.1 unless that would bring the peak over 0.95.
    """
    rows, ends = _TABLE[phases], np.cumsum(samples)
    word = np.cumsum(np.isin(phases, _WORD_ENDS))
    stress = 10.0 ** (-rng.uniform(0.0, STRESS, word[-1] + 1) / 20)
    rows[:, 4:7] *= stress[word, None]
    total = int(ends[-1])
    frames = total // HOP + 2
    row = np.minimum(np.searchsorted(ends, np.arange(frames) * HOP, side="right"), len(ends) - 1)
    tracks = convolve1d(rows[row][:, [1, 2, 3, 9]], _GLIDE, axis=0, mode="nearest") * voice.tract

    ending = _ending(phases, samples)
    pitch = voice.pitch * _intonation(phases, ends, frames, rng)
    pitch *= np.exp(-FINAL_FALL * ending[np.minimum(np.arange(frames) * HOP, total - 1)])
    cycles = np.cumsum(np.repeat(pitch / RATE, HOP)[:total])
    pulses = _GLOTTIS[(cycles * len(_GLOTTIS)).astype(np.int64) % len(_GLOTTIS)]
    noise = rng.standard_normal(total, dtype=np.float32)
    fading = 10.0 ** (-FINAL_FADE / 20 * ending)
    voiced, breath, hiss = (fading * _envelope(rows[:, k], samples) for k in (4, 5, 6))
    breath += (voice.breath + FINAL_BREATH * ending) * voiced
    glottal = pulses * voiced * (1.0 - FINAL_PULSES * ending) + noise * breath

    spectrum = _frames(glottal, frames) * _tract_response(tracks, voice.tract)
    spectrum += _frames(noise * hiss, frames) * _hiss_responses(voice.tract)[phases[row]]
    spectrum *= _levelling(spectrum)[:, None]
    pieces = fft.irfft(spectrum, FFT, axis=1).reshape(frames, FFT // HOP, HOP)
    out = np.zeros((frames + FFT // HOP - 1, HOP), dtype=np.float32)
    for part in range(FFT // HOP):
        out[part : part + frames] += pieces[:, part]
    wave = out.reshape(-1)[HOP : HOP + total]  # frame 0 starts one hop before sample 0

    level, signal_to_noise = rng.uniform(0.055, 0.095), rng.uniform(45.0, 57.0)
    wave = _in_a_room(wave, rng)
    rms = float(np.sqrt(np.mean(np.square(wave)))) or 1.0  # nothing but pauses: the room alone
    wave = wave + _room_noise(noise[::-1]) * np.float32(rms * 10 ** (-signal_to_noise / 20))
    wave = wave * min(level / rms, 0.95 / float(np.abs(wave).max()))
    return np.clip(wave, -0.95, 0.95).astype(np.float32)  # that factor is rounded


def _levelling(spectrum: NDArray[np.complex64]) -> Floats:
    """Gains [F] for frames [F, K] that take away ``LEVELLING`` of the dB that 0.1 s about them lie
    under the loudest, of 30 dB at most."""
    power = uniform_filter1d(np.mean(np.square(np.abs(spectrum)), axis=1), 11)
    loudest = max(power.max(), np.finfo(np.float32).tiny)
    return np.asarray(np.maximum(power / loudest, 1e-3) ** (-LEVELLING / 2), dtype=np.float32)


def _in_a_room(wave: Floats, rng: np.random.Generator) -> Floats:
    """The sound and its reverberation [N]: noise that decays by 60 dB in 0.2 to 0.4 s, its energy
    5 to 11 dB under the direct sound's (Polack's model). Sounds fade into pauses that way."""
    seconds, under = rng.uniform(0.2, 0.4), rng.uniform(5.0, 11.0)
    decay = 10.0 ** (-3.0 * np.arange(int(seconds * RATE)) / (seconds * RATE))
    response = rng.standard_normal(len(decay)) * decay
    response *= 10 ** (-under / 20) / np.sqrt(np.sum(np.square(response)))
    response[0] += 1.0
    return np.asarray(oaconvolve(wave, response)[: len(wave)], dtype=np.float32)


def _room_noise(white: Floats) -> Floats:
    """A quiet room's noise [N], of unit RMS: falling by 6 dB an octave from 150 Hz to a floor."""
    pole = np.exp(-2 * np.pi * 150.0 / RATE)
    noise = lfilter([1.0 - pole], [1.0, -pole], white) + 0.02 * white
    return np.asarray(noise / np.sqrt(np.mean(np.square(noise))), dtype=np.float32)


def _ending(phases: Ints, samples: Ints) -> Floats:
    """How far each sample [N] is into the end of its phrase, 0 to 1; 1 in pauses, edges of 8 ms."""
    ends = np.cumsum(samples)
    silence = np.where(phases == PAUSE, ends - samples, ends[-1])
    silence = np.minimum.accumulate(silence[::-1])[::-1]  # the next pause of each phase
    left = np.repeat(silence, samples) - np.arange(ends[-1])
    return _rounded(np.clip(1.0 - left / (FINAL * RATE), 0.0, 1.0))


def _envelope(gains: Floats, samples: Ints) -> Floats:
    """Gains of the phases [S] as a smooth curve over samples [N]; edges of about 8 ms."""
    return _rounded(np.repeat(gains, samples))


def _rounded(steps: NDArray[np.floating]) -> Floats:
    """A curve over samples [N] without its corners."""
    return np.asarray(uniform_filter1d(uniform_filter1d(steps, 96), 96), dtype=np.float32)


def _intonation(
    phases: Ints, ends: Ints, frames: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Relative pitch [F]: falling over each phrase, a random movement as wide as in recorded speech
    (steps of 0.2 s), a little jitter."""
    time = np.arange(frames) * HOP
    borders = np.concatenate([[0], ends[phases == PAUSE], [ends[-1] + 1]])
    phrase = np.searchsorted(borders, time, side="right") - 1
    phrase = np.minimum(phrase, len(borders) - 2)
    start, stop = borders[phrase], borders[phrase + 1]
    falling = 1.12 - 0.24 * (time - start) / np.maximum(stop - start, 1)
    knots = np.arange(0, ends[-1] + RATE // 5, RATE // 5)
    moving = np.interp(time, knots, rng.normal(0.0, 0.19, len(knots)))
    jitter = rng.normal(0.0, 0.006, frames)
    return np.asarray(falling * (1.0 + np.clip(moving, -0.38, 0.38) + jitter))


def _frames(signal: Floats, frames: int) -> NDArray[np.complex64]:
    """Spectra [F, K] of Hann-windowed frames at 50 % overlap (the windows sum to 1)."""
    padded = np.zeros((frames + 1) * HOP, dtype=np.float32)
    padded[HOP : HOP + len(signal)] = signal
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    return np.asarray(fft.rfft(windows * _HANN, FFT, axis=1))


def _resonator(frequency: Floats | float, bandwidth: float) -> tuple[Floats, Floats]:
    """Coefficients a1, a2 of the polynomial 1 + a1/z + a2/z^2 with a root pair at ``frequency``."""
    radius = np.exp(-np.pi * bandwidth / RATE)
    a1 = -2.0 * radius * np.cos(2 * np.pi * np.asarray(frequency) / RATE)
    return a1.astype(np.float32), np.full_like(a1, radius**2, dtype=np.float32)


def _tract_response(tracks: Floats, tract: float) -> NDArray[np.complex64]:
    """Cascade of five formants and a nasal pole-zero pair, each of unit gain at 0 Hz.

    Args:
        tracks: [F, 4] the first three formants and the antiresonance, in Hz.
        tract: formant factor, for the fixed resonances.

    Returns:
        [F, K] complex response.
    """
    poles = np.zeros((len(tracks), 7), dtype=np.float32)
    poles[:, 0] = 1.0
    gain = np.ones(len(tracks), dtype=np.float32)
    for column, bandwidth in enumerate((70.0, 95.0, 150.0)):
        a1, a2 = _resonator(tracks[:, column], bandwidth)
        gain *= 1.0 + a1 + a2
        later = poles.copy()
        later[:, 1:] += a1[:, None] * poles[:, :-1]
        later[:, 2:] += a2[:, None] * poles[:, :-2]
        poles = later
    fixed = np.ones(len(_BINS), dtype=np.complex64)
    for frequency, bandwidth in ((3600.0, 250.0), (4700.0, 350.0), (NEUTRAL, 120.0)):
        a1, a2 = _resonator(min(frequency * tract, 7600.0), bandwidth)
        fixed *= (1.0 + a1 + a2) / (1.0 + a1 * _DELAY + a2 * _DELAY**2)
    z1, z2 = _resonator(tracks[:, 3], 120.0)
    gain /= 1.0 + z1 + z2
    response = np.outer(z1, _DELAY)
    response += 1.0 + np.outer(z2, _DELAY**2)
    response *= fixed
    response /= fft.rfft(poles, FFT, axis=1)
    response *= gain[:, None]
    return np.asarray(response)


def _hiss_responses(tract: float) -> Floats:
    """Gaussian band of each phase's hiss [P, K], of unit power."""
    centre, width = _TABLE[:, 7:8] * np.sqrt(tract), _TABLE[:, 8:9]
    band = np.exp(-0.5 * ((_BINS - centre) / width) ** 2)
    return np.asarray(band / np.sqrt(np.mean(band**2, axis=1, keepdims=True)), dtype=np.float32)
