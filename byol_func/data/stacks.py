"""Reads images with any number of channels: TIFF files, by the library tifffile, and arrays in `.npy` files."""

import contextlib
import functools
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from byol_func.data.levels import ValueRange, to_uint8
from byol_func.errors import UserError, counted

_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # The last two are those of BigTIFF.
_NPY = b'\x93NUMPY'
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_reader(paths: Sequence[str], channels: int) -> None:
    """Raises a UserError if there are TIFF files, and tifffile is not installed."""
    if channels and any(path.lower().endswith(('.tif', '.tiff')) for path in paths):
        try:
            _tifffile()
        except ImportError as error:
            raise UserError(
                f'config.dataset.channels={channels}: {error}, which reads TIFF; pip install tifffile, or '
                "'byol_func[tiff]', or expected .npy files"
            ) from error


def read(data: bytes, channels: int) -> np.ndarray | None:
    """Returns the values in a file, `[H, W, C]` of any type of number; None for another format than TIFF and `.npy`.

    The channels of a TIFF file are its pages, or those of its only page, stored pixel by pixel or one after the other.
    An array is `[C, H, W]` or `[H, W, C]`, or `[H, W]` if `channels` is 1. Nothing is unpickled.

    Args:
      data: the contents of the file.
      channels: C, as the user expects it.

    Raises:
      ValueError: the file has another number of channels, or values that are not finite; or it cannot be read.
      ImportError: a library is missing.
    """
    if data.startswith(_TIFF):
        values = _tiff(data, channels)
    elif data.startswith(_NPY):
        values = _npy(data, channels)
    else:
        return None
    if not values.size:
        raise ValueError('no pixels')
    if values.dtype.kind not in 'uif':
        raise ValueError(f'values of type {values.dtype}; expected integers or floats')
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        raise ValueError('values that are not finite')
    return values


def decode(data: bytes, channels: int, source_size: int, value_range: ValueRange) -> np.ndarray | None:
    """Does the same as `read`, and converts the values to uint8 `[H, W, C]`; bytes are kept as they are.

    With a `source_size`, every channel is resized as `decoding.decode_file` resizes images. Raises the same errors,
    and those of `to_uint8`.
    """
    values = read(data, channels)
    if values is None:
        return None
    pixels = values if values.dtype == np.uint8 else to_uint8(values, value_range, f'{values.dtype} values')
    return resized(np.ascontiguousarray(pixels), source_size)


def resized(pixels: np.ndarray, source_size: int) -> np.ndarray:
    """Resizes every channel of uint8 `[H, W, C]` to the central square of `source_size`; 0 keeps the size."""
    if not source_size:
        return pixels
    from PIL import ImageOps

    images = [Image.fromarray(np.ascontiguousarray(channel)) for channel in pixels.transpose(2, 0, 1)]
    fit = lambda image: ImageOps.fit(image, (source_size, source_size), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(fit(image)) for image in images], axis=2)


def _npy(data: bytes, channels: int) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:  # Version 3 is for arrays with named fields.
        raise ValueError(f'version {version[0]}.{version[1]} of the .npy format; expected 1.0 or 2.0')
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in 'uif':  # An object would have to be unpickled.
        raise ValueError(f'values of type {dtype}; expected integers or floats')
    words = ' x '.join(map(str, shape)) or 'no axes'
    if not (len(shape) == 3 or len(shape) == 2 and channels == 1) or 0 in shape:
        raise ValueError(f'an array of {words}; expected [{channels}, H, W] or [H, W, {channels}]')
    needed, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if there < needed:
        raise ValueError(f'truncated: {there} bytes of an array of {words}; expected {needed}')
    values = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    values = values.reshape(shape, order='F' if is_fortran else 'C')
    if len(shape) == 2:
        return values[:, :, None]
    if shape[0] == channels:
        return values.transpose(1, 2, 0)
    if shape[2] == channels:
        return values
    found = counted(min(shape[0], shape[2]), 'channel')
    raise ValueError(f'{found} in an array of {words}; expected [{channels}, H, W] or [H, W, {channels}]')


def _tiff(data: bytes, channels: int) -> np.ndarray:
    tifffile = _tifffile()
    with contextlib.ExitStack() as stack:
        with _damages():
            file = stack.enter_context(tifffile.TiffFile(io.BytesIO(data)))
            series = file.series[0]
        axes, shape = series.axes, series.shape
        words = ' x '.join(map(str, shape))
        if 'Y' not in axes or 'X' not in axes:
            raise ValueError(f'an array of {words}; expected an image')
        sides = axes.index('Y'), axes.index('X')
        most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # As Pillow does.
        if shape[sides[0]] * shape[sides[1]] > most:
            raise ValueError(f'{words} pixels; expected at most {most}')
        page, kinds = file.pages.first, tifffile.PHOTOMETRIC
        is_jpeg = page.compression == tifffile.COMPRESSION.JPEG and page.photometric == kinds.YCBCR  # Becomes RGB.
        if page.photometric not in (kinds.MINISBLACK, kinds.RGB, kinds.SEPARATED) and not is_jpeg:
            name = getattr(page.photometric, 'name', page.photometric)
            raise ValueError(f'values of the kind {name}; expected MINISBLACK, RGB or SEPARATED')
        others = [size for i, size in enumerate(shape) if i not in sides and size != 1]
        if len(others) > 1:
            raise ValueError(f'an array of {words} ({axes}); expected a single image, with one axis of channels')
        if (found := math.prod(others)) != channels:
            raise ValueError(f'{counted(found, "channel")}; expected {channels}, as config.dataset.channels says')
        with _damages():
            values = series.asarray(maxworkers=1)
        values = np.moveaxis(values, sides, (0, 1))
    return values.reshape(*values.shape[:2], -1)


@contextlib.contextmanager
def _damages() -> Iterator[None]:
    """Turns what tifffile raises in this context into a ValueError that says what is wrong with the file."""
    try:
        yield
    except Exception as error:  # Its decoders raise all kinds of errors on damaged files.
        raise ValueError(f'a damaged or truncated TIFF file: {error}') from error


@functools.cache
def _tifffile() -> Any:
    """Imports tifffile, and silences its remarks on odd tags in files that it can read."""
    import tifffile

    tifffile.logger().setLevel('CRITICAL')
    return tifffile
