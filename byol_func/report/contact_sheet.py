"""A contact sheet of the augmentations: the views that the network sees, and the random draws behind them.

This module only draws: it takes images, draws and views, and returns one picture.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from byol_func.utils.sampling import Presets, ViewDraws

VIEWS = ('view1', 'view2')
_COLORS = {'view1': '#c8102e', 'view2': '#0a5fc2'}  # Colours of the headings and of the crop windows on the originals.
_TEXT, _FAINT, _FRAME = '#1c1c1c', '#6a6a6a', '#c8c8c8'
_TILE, _ORIGINAL = 128, 168  # The longest side of a view and of an original on the sheet, in pixels.
_GAP, _MARGIN, _LINE = 14, 18, 15
_STEP = _TILE + _GAP  # Distance between the left edges of two columns.
_OPERATIONS = (('brightness', 'B'), ('contrast', 'C'), ('saturation', 'S'), ('hue', 'H'))


def contact_sheet(
    images: torch.Tensor,
    draws: Sequence[Mapping[str, ViewDraws]],
    views: Sequence[Mapping[str, torch.Tensor]],
    presets: Presets,
    *,
    title: str,
    captions: Sequence[str],
) -> Image.Image:
    """Draws the originals with their crop windows, then D draws of view 1 and D draws of view 2.

    The text below each view lists the operations that made it, see `operations`. Small images are
    enlarged without smoothing.

    Args:
      images: uint8 `[N, C, H, W]`; more than three channels are shown by the first three, two by the first.
      draws: D dicts `{'view1', 'view2'}` with the ViewDraws of N images.
      views: D dicts `{'view1', 'view2'}` with floats `[N, C, S, S]` in [0, 1], the outputs of
        `augmentations.postprocess` for these images and draws.
      presets: `{'view1', 'view2'}`, the presets of `augmentations.postprocess`.
      title: the first line.
      captions: one word to write below each image, such as its class, or ''.

    Returns:
      An RGB picture with one row per image.
    """
    num_draws, (_, channels, height, width) = len(draws), images.shape
    size, font = views[0]['view1'].shape[2], _font(12)
    pictures = [_fit(_to_picture(image), _ORIGINAL) for image in images]
    tiles = {view: [[_fit(_to_picture(x), _TILE) for x in views[d][view]] for d in range(num_draws)] for view in VIEWS}
    words = {
        view: [
            [
                _wrap(operations(draws[d][view], presets[view], i, channels, (height, width), size), font, _TILE)
                for i in range(len(images))
            ]
            for d in range(num_draws)
        ]
        for view in VIEWS
    }
    left = {'original': _MARGIN, 'view1': _MARGIN + max(pictures[0].width, _TILE) + 2 * _GAP}
    left['view2'] = left['view1'] + num_draws * _STEP + _GAP
    sheet_width = left['view2'] + num_draws * _STEP - _GAP + _MARGIN

    head = _head(presets, channels, size, font, sheet_width - 2 * _MARGIN)
    tops, top = [], _MARGIN + 28 + _LINE * len(head) + 36
    for i in range(len(images)):
        tops.append(top)
        lines = max(len(words[view][d][i]) for view in VIEWS for d in range(num_draws))
        top += max(pictures[i].height + _LINE, tiles['view1'][0][i].height + _LINE * lines) + 4 + _GAP
    sheet = Image.new('RGB', (sheet_width, top - _GAP + _MARGIN), 'white')
    pen = ImageDraw.Draw(sheet)

    _draw_head(pen, title, head)
    pen.text((left['original'], tops[0] - 24), f'{width} x {height} pixels', _TEXT, _font(14))
    for i, y in enumerate(tops):
        _paste(sheet, pen, pictures[i], left['original'], y, captions[i].encode('ascii', 'replace').decode())
        windows = {view: [d[view].crop[i].tolist() for d in draws] for view in VIEWS}
        _draw_windows(pen, (left['original'], y), pictures[i].width / width, windows)
    for view in VIEWS:
        for d in range(num_draws):
            x = left[view] + d * _STEP
            pen.text((x, tops[0] - 24), f'view {view[-1]}, draw {d + 1}', _COLORS[view], _font(14))
            for i, y in enumerate(tops):
                _paste(sheet, pen, tiles[view][d][i], x, y, '\n'.join(words[view][d][i]))
    return sheet


def operations(
    draws: ViewDraws, presets: Presets, i: int, channels: int, source_size: tuple[int, int], size: int
) -> list[str]:
    """Lists the operations that were applied to image i, in order.

    For example `['crop 21x17 at 3,5', 'flip', 'H-0.05', 'Cx1.20', 'B+0.31', 'Sx0.92', 'gray', 'blur 1.2',
    'solarize']`. Crops are width x height at left, top, in pixels of the original; B, C, S and H are the
    changes of brightness, contrast, saturation and hue; the sigma of the blur is in pixels of the view.

    Args:
      draws: the ViewDraws of one view.
      presets: the presets of this view.
      i: index of the image.
      channels: C; only images with three channels have colour operations.
      source_size: height and width of the original.
      size: S, the side length of the view.
    """
    color = presets['color_transform']
    top, left, height, width = (int(x) for x in draws.crop[i])
    whole = (height, width) == tuple(source_size)
    items = ['whole image' if whole else f'crop {width}x{height} at {left},{top}']
    if presets['random_flip'] and draws.flip[i]:
        items.append('flip')
    if color['apply_prob'] > 0 and color['color_jitter_prob'] > 0 and draws.jitter[i]:
        items += [
            _jitter_word(draws, color, i, k)
            for k in draws.order[i].tolist()
            if color[_OPERATIONS[k][0]] > 0 and (k < 2 or channels == 3)
        ]
    if color['apply_prob'] > 0 and color['to_grayscale_prob'] > 0 and draws.grayscale[i] and channels == 3:
        items.append('gray')
    if presets['gaussian_blur']['apply_prob'] > 0 and draws.blur[i] and _blur_taps(presets, size) > 1:
        items.append(f'blur {draws.sigma[i]:.1f}')
    if presets['solarize']['apply_prob'] > 0 and draws.solarize[i]:
        items.append('solarize')
    return items


def _jitter_word(draws: ViewDraws, color: Presets, i: int, k: int) -> str:
    name, letter = _OPERATIONS[k]
    value = getattr(draws, name)[i].item()
    adds = name == 'hue' or (name == 'brightness' and color['semantics'] == 'official')
    return f'{letter}{value:+.2f}' if adds else f'{letter}x{value:.2f}'


def _blur_taps(presets: Presets, size: int) -> int:
    return 2 * int(size / presets['gaussian_blur']['blur_divider'] / 2) + 1


def summarize_presets(presets: Presets, channels: int, size: int) -> str:
    """Describes one view's presets in one line, with probabilities below 1 in percent; omits disabled operations."""
    crop, color, blur, solarize = (
        presets[name] for name in ('random_crop', 'color_transform', 'gaussian_blur', 'solarize')
    )
    parts = []
    if crop['apply_prob'] > 0:
        parts.append(
            f'crop{_percent(crop)} to {100 * crop["min_area"]:.3g}..{100 * crop["max_area"]:.3g} % '
            f'of the area, aspect {crop["min_aspect"]:.2f}..{crop["max_aspect"]:.2f}'
        )
    if presets['random_flip']:
        parts.append('flip 50 %')
    ranges = [
        f'{letter} {color[name]:.3g}'
        for k, (name, letter) in enumerate(_OPERATIONS)
        if color[name] > 0 and (k < 2 or channels == 3)
    ]
    jitter = color['apply_prob'] * color['color_jitter_prob']
    if jitter > 0 and ranges:
        how = ', of torchvision' if color['semantics'] == 'torchvision' else ''
        parts.append(f'jitter {100 * jitter:.3g} % ({" ".join(ranges)}{how})')
    gray = color['apply_prob'] * color['to_grayscale_prob']
    if gray > 0 and channels == 3:
        parts.append(f'gray {100 * gray:.3g} %')
    if blur['apply_prob'] > 0 and _blur_taps(presets, size) > 1:
        parts.append(
            f'blur{_percent(blur)}, sigma {blur["sigma_min"]:.3g}..{blur["sigma_max"]:.3g}, '
            f'{_blur_taps(presets, size)} taps'
        )
    if solarize['apply_prob'] > 0:
        parts.append(f'solarize{_percent(solarize)} at {solarize["threshold"]:.3g}')
    return '; '.join(parts) or 'nothing'


def _percent(presets: Presets) -> str:
    return f' {100 * presets["apply_prob"]:.3g} %' if presets['apply_prob'] < 1 else ''


def _head(presets: Presets, channels: int, size: int, font, width: int) -> list[tuple[str, str]]:
    """Returns the lines below the title, with their colours."""
    lines = []
    for view in VIEWS:
        words = f'view {view[-1]}: {summarize_presets(presets[view], channels, size)}'.split(' ')
        lines += [(line, _COLORS[view]) for line in _wrap(words, font, width, ' ')]
    note = (
        'B brightness, C contrast, S saturation, H hue (turns), in the order applied: + added, x factor. '
        'Crops: width x height at left, top.'
    )
    return lines + [(line, _FAINT) for line in _wrap(note.split(' '), font, width, ' ')]


def _wrap(items: Sequence[str], font, width: int, between: str = '  ') -> list[str]:
    """Joins the items into lines of at most `width` pixels, without breaking an item."""
    lines: list[str] = []
    for item in items:
        if lines and font.getlength(lines[-1] + between + item) <= width:
            lines[-1] += between + item
        else:
            lines.append(item)
    return lines


def _to_picture(image: torch.Tensor) -> Image.Image:
    """Converts an image `[C, H, W]`, uint8 or float in [0, 1], to an RGB picture of the same size."""
    if image.dtype != torch.uint8:
        image = (image * 255.0).round().to(torch.uint8)
    return Image.fromarray(visible(image).permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy())


def visible(images: torch.Tensor) -> torch.Tensor:
    """Returns the channels of images `[..., C, H, W]` that are shown: the first three, or the first of two."""
    return images[..., : 3 if images.shape[-3] >= 3 else 1, :, :]


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Resizes the longer side to at most `side`: shrinks it, or enlarges it by an integer factor without smoothing."""
    longer = max(picture.size)
    if longer > side:
        size = [max(1, round(x * side / longer)) for x in picture.size]
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture.resize([x * (side // longer) for x in picture.size], Image.Resampling.NEAREST)


def _draw_head(pen: ImageDraw.ImageDraw, title: str, head: list[tuple[str, str]]) -> None:
    pen.text((_MARGIN, _MARGIN - 4), title, _TEXT, _font(17))
    for k, (text, color) in enumerate(head):
        pen.text((_MARGIN, _MARGIN + 26 + k * _LINE), text, color, _font(12))


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int, text: str) -> None:
    """Pastes a picture with text below it and a thin frame around it, which shows the edges of white images."""
    pen.text((x, y + picture.height + 4), text, _TEXT, _font(12), spacing=_LINE - 12)
    pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_FRAME)
    sheet.paste(picture, (x, y))


def _draw_windows(pen: ImageDraw.ImageDraw, corner: tuple[int, int], scale: float, windows) -> None:
    """Outlines the crops `(top, left, height, width)` of each view, with the numbers of their columns."""
    for view in reversed(VIEWS):
        for d, (top, left, height, width) in enumerate(windows[view]):
            x, y = corner[0] + left * scale, corner[1] + top * scale
            box = (x, y, x + width * scale - 1, y + height * scale - 1)
            pen.rectangle(box, outline=_COLORS[view], width=1 if len(windows[view]) > 3 else 2)
            at = {'view1': (box[0] + 4, box[1] + 1), 'view2': (box[2] - 9, box[3] - 14)}[view]
            pen.text(at, str(d + 1), _COLORS[view], _font(11), stroke_width=2, stroke_fill='white')


@functools.cache
def _font(size: int):
    """Returns Pillow's built-in font, which has only ASCII but is always installed."""
    return ImageFont.load_default(size)
