"""Decodes image files of any format and mode to uint8 pixels."""

import contextlib
import functools
import io
import math
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from byol_func.data import levels, stacks

# Part of every cache key. Increment it when a code change alters the decoded pixels of any file.
VERSION = 1
_END_OF_JPEG = b'\xff\xd9'


class BadImage(Exception):
    """Raised for a file that cannot be read as an image; the message is one line and contains the path."""


class Form(NamedTuple):
    """How the pixels of a file are converted."""

    source_size: int = 0  # 0 keeps the image's own size; otherwise the side of the central square in pixels
    grayscale: bool = False  # convert to one channel, 0.299 R + 0.587 G + 0.114 B
    exif_orientation: bool = False  # rotate as the EXIF data says; otherwise keep the pixels as stored
    value_range: levels.ValueRange = ()  # values mapped to 0 and 255 in files of more than 8 bits; (): 0 and 65535
    channels: int = 0  # number of channels, see `decode_file`; 0: that of `grayscale`

    @property
    def num_channels(self) -> int:
        """The number of channels of the pixels."""
        return self.channels or (1 if self.grayscale else 3)


_AS_STORED = Form()


def decode_file(path: str, form: Form = _AS_STORED) -> np.ndarray:
    """Decodes one image file to uint8 `[H, W, C]`, where C is 3, or 1 for grayscale, or `form.channels`.

    With `form.channels`, TIFF and `.npy` files must have that many channels, which are kept as they are (see
    `stacks`). Files of other formats are then converted to 1 or 3 channels; no other number will do for them.

    Args:
      path: a file in any format that Pillow reads, or a `.npy` file if `form.channels` is not 0.
      form: how its pixels are converted.

    Raises:
      BadImage: the file is missing or cannot be decoded; the message gives the path and the reason.
    """
    return decode(functools.partial(read_file, path), path, form)


def read_file(path: str) -> bytes:
    """Returns the contents of a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no file but, for example, a pipe.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # Opening a pipe would block forever.
        raise ValueError('not a file')
    with open(path, 'rb') as file:
        return file.read()


def decode(read: Callable[[], bytes], path: str, form: Form = _AS_STORED) -> np.ndarray:
    """Decodes one image to uint8 `[H, W, C]` as `decode_file` does.

    Args:
      read: returns the contents of the image file.
      path: the name of the image in an error message.
      form: how its pixels are converted.

    Raises:
      BadImage: `read` fails, or the image cannot be decoded; the message gives the path and the reason.
    """
    try:
        data = read()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns about odd tags in files that it can read.
            stacked = _stacked(data, form)
            if stacked is not None:
                return stacked
            pixels = _fast_jpeg(data, form)
            if pixels is None or form.source_size:
                image = _pillow(data, form) if pixels is None else Image.fromarray(pixels)
                if form.source_size:
                    # Resizes the shorter side to source_size and crops the centre; only the crop is resampled.
                    image = ImageOps.fit(image, (form.source_size, form.source_size), Image.Resampling.BICUBIC)
                pixels = np.asarray(image)
            return pixels if pixels.ndim == 3 else pixels[:, :, None]
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files.
        reason = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Pillow's message contains a memory address.
            reason = 'not in a format that Pillow reads'
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise BadImage(f'cannot read the image {path!r} ({reason})') from error


def _stacked(data: bytes, form: Form) -> np.ndarray | None:
    """Decodes a TIFF or `.npy` file whose channels are to be kept; returns None for files that are left to Pillow."""
    if not form.channels:
        return None
    pixels = stacks.decode(data, form.channels, form.source_size, form.value_range)
    if pixels is None and form.channels not in (1, 3):
        raise ValueError(f'neither TIFF nor .npy; expected one of them for config.dataset.channels={form.channels}')
    return pixels


def _fast_jpeg(data: bytes, form: Form) -> np.ndarray | None:
    """Decodes a complete, ordinary JPEG with torchvision: the same pixels as Pillow's in four fifths of the time.

    Returns None for everything else. Images that must be rotated are left to Pillow, which finds the
    orientation in more places. Truncated files are left to it too, since torchvision's decoder silently accepts
    a missing end.
    """
    if data[:2] != b'\xff\xd8' or data[-2:] != _END_OF_JPEG:
        return None
    if not 0 < _num_pixels(data) <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow rejects such sizes.
        return None
    if form.exif_orientation and _is_turned(data):
        return None
    from torchvision.io import ImageReadMode, decode_jpeg  # The import takes seconds, so do it only for JPEGs.

    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    channels, wanted = len(pixels), form.num_channels
    if channels == 3 and wanted == 3:
        return pixels.permute(1, 2, 0).contiguous().numpy()
    if channels == 1:
        gray = pixels[0].numpy()
        return gray if wanted == 1 else np.repeat(gray[:, :, None], 3, axis=2)
    return None


def _num_pixels(data: bytes) -> int:
    """Returns height times width from the header of a JPEG; 0 if they are not found."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # A fill byte.
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[place + 5 : place + 7]) * int.from_bytes(data[place + 7 : place + 9])
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return 0


def _is_turned(data: bytes) -> bool:
    """Returns whether the EXIF or XMP data of a JPEG specify an orientation other than the stored one."""
    if b'Exif' not in data and b'rientation' not in data:  # much faster than parsing the header
        return False
    with Image.open(io.BytesIO(data)) as file:
        return file.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _pillow(data: bytes, form: Form) -> Image.Image:
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        if form.exif_orientation:
            ImageOps.exif_transpose(file, in_place=True)
        image = to_rgb(file, form.value_range)
        return image.convert('L') if form.num_channels == 1 else image.copy()


def to_rgb(image: Image.Image, value_range: levels.ValueRange = ()) -> Image.Image:
    """Converts an image of any mode to RGB.

    Values of more than 8 bits are scaled linearly, so that the ends of `value_range` become 0 and 255 (Pillow
    would clip them at 255). Values outside the range are clipped. Transparent images are composited on white;
    Pillow and ImageFolder would show the hidden colours of transparent pixels.

    Args:
      image: any image.
      value_range: the smallest and the largest value; () means 0 and 65535.

    Raises:
      ValueError: the image has float values, or values outside 0..65535, and no `value_range` is given.
    """
    if image.mode.startswith(('I', 'F')):
        image = Image.fromarray(levels.to_uint8(np.asarray(image), value_range, f'values of mode {image.mode}'))
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def drops_bits(read: Callable[[], bytes], form: Form = _AS_STORED) -> bool:
    """Returns whether an image file has colours of 16 bits, of which Pillow keeps the upper 8 without a word.

    `read` returns the contents of the file. The result is False for unreadable files.
    """
    with contextlib.suppress(Exception), warnings.catch_warnings():  # Decoding reports bad files later.
        warnings.simplefilter('ignore')
        data = read()
        if form.channels and stacks.read(data, form.channels) is not None:
            return False
        with Image.open(io.BytesIO(data)) as file:
            return not file.mode.startswith(('I', 'F')) and ';16' in str(file.tile)
    return False


def largest_values(read: Callable[[], bytes], form: Form = _AS_STORED) -> list[int] | None:
    """Returns the largest value of every channel, rounded up, in an image file of more than 8 bits.

    `read` returns the contents of the file. Returns None for other files, for unreadable ones, and for floats if `form`
    has no `value_range`.
    """
    with contextlib.suppress(Exception), warnings.catch_warnings():  # Decoding reports bad files later.
        warnings.simplefilter('ignore')
        data = read()
        values = stacks.read(data, form.channels) if form.channels else None
        if values is not None:
            is_wide = values.dtype != np.uint8 and (form.value_range or values.dtype.kind != 'f')
            return levels.largest_of(values) if is_wide else None
        with Image.open(io.BytesIO(data)) as file:
            if file.mode.startswith(('I', 'F') if form.value_range else 'I'):
                return levels.largest_of(np.asarray(file))
    return None
