"""One image file as uint8 pixels, whatever its format and mode."""

import io
import math
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# Part of the key of every cache: raise it when the pixels of any file change.
VERSION = 1
_END_OF_JPEG = b'\xff\xd9'


class BadImage(Exception):
    """A file that cannot be read as an image; the message is one line with its path."""


def decode_file(path: str, source_size: int = 0, grayscale: bool = False) -> np.ndarray:
    """Reads one image file as uint8 `[H, W, C]`, C = 3, or 1 if `grayscale`.

    Args:
      path: of a file in any format that Pillow reads.
      source_size: 0 keeps the image's own size; otherwise the shorter side is resized to it, and the
        middle square is kept.
      grayscale: whether one channel is wanted, 0.299 R + 0.587 G + 0.114 B.

    Raises:
      BadImage: there is no such image; the message names the path and the reason.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # Opening a pipe would wait for ever.
            raise ValueError('not a file')
        with open(path, 'rb') as file:
            data = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's doubts about tags of files that it can read.
            image = _fast_jpeg(data, grayscale)
            if image is None or source_size:
                image = _pillow(data, grayscale) if image is None else Image.fromarray(image)
                if source_size:
                    # Resizes the shorter side and keeps the middle, without resizing what is cut off.
                    image = ImageOps.fit(image, (source_size, source_size), Image.Resampling.BICUBIC)
            pixels = np.asarray(image)
            return pixels if pixels.ndim == 3 else pixels[:, :, None]
    except Exception as error:  # on a damaged file Pillow's decoders raise what they stumble over
        reason = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Pillow's message names a place in memory.
            reason = 'not in a format that Pillow reads'
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise BadImage(f'cannot read the image {path!r} ({reason})') from error


def _fast_jpeg(data: bytes, grayscale: bool) -> np.ndarray | None:
    """A whole, ordinary JPEG by torchvision's decoder: Pillow's pixels in four fifths of the time.

    None for everything else. That decoder passes over a missing end without a word.
    """
    if data[:2] != b'\xff\xd8' or data[-2:] != _END_OF_JPEG:
        return None
    if not 0 < _num_pixels(data) <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow refuses it; this would not.
        return None
    from torchvision.io import ImageReadMode, decode_jpeg  # Imports for seconds; most data are no JPEGs.

    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    channels, wanted = len(pixels), 1 if grayscale else 3
    if channels == 3 and wanted == 3:
        return pixels.permute(1, 2, 0).contiguous().numpy()
    if channels == 1:
        gray = pixels[0].numpy()
        return gray if grayscale else np.repeat(gray[:, :, None], 3, axis=2)
    return None


def _num_pixels(data: bytes) -> int:
    """Height times width of a JPEG by its header; 0 if they are not found."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # Filling.
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[place + 5 : place + 7]) * int.from_bytes(data[place + 7 : place + 9])
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return 0


def _pillow(data: bytes, grayscale: bool) -> Image.Image:
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        image = to_rgb(file)
        return image.convert('L') if grayscale else image.copy()


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB; ValueError for 32 bits, whose range is not known.

    Values of 16 bits are divided by 257, where Pillow would clip them at 255. Transparent images
    are laid on white, where Pillow (and ImageFolder) would bring out the hidden colours. The
    orientation noted in a photo's EXIF is ignored, as by ImageFolder and by the official code.
    """
    if image.mode.startswith(('I', 'F')):
        values = np.asarray(image)
        if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
            raise ValueError(f'mode {image.mode}: expected at most 16 bits per channel')
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')
