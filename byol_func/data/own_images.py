"""Loads a folder or tar shards of images: into memory, through a cache, or as a stream if it is too large for that."""

from absl import logging

from byol_func.data import arrays, cache, decoding, folder, listing, shards, stacks
from byol_func.data.examples import Dataset
from byol_func.data.streaming import Stream
from byol_func.errors import counted


def load_folder(
    split: str,
    name: str,
    root: str,
    form: decoding.Form,
    *,
    max_gib: float,
    max_bad_fraction: float,
    num_workers: int,
    cache_dir: str,
    allow_empty: bool,
) -> Dataset | Stream | None:
    """Reads a split of a folder into memory, or prepares to stream it; the arguments are those of `dataset.load`.

    Returns:
      The split; None for the test split of a folder without labels.

    Raises:
      UserError: the folder is not as expected, its images do not fit the memory, or too many cannot be read.
    """
    if name == 'shards':
        files = shards.list_shards(split, root, form.channels)
    else:
        files = listing.list_files(split, root, allow_empty, form.channels)
    if files is None:
        return None
    stacks.check_reader(files.paths, form.channels)
    folder.warn_of_range(files, form)
    arrays.check_one_image(form.source_size, form.num_channels)
    decoded = cache.open_or_make(files, form, cache_dir, max_bad_fraction) if cache_dir else None
    shape = decoded.images().shape[1:] if decoded else folder.image_size(files, form)
    gib = arrays.size_in_gib(len(files.paths), shape)
    if gib > max_gib:
        workers = counted(num_workers, 'worker process')
        what = 'Streaming %s: %.3f GiB are more than config.dataset.max_gib=%s; %s'
        logging.info(what, files.split, gib, max_gib, workers)
        return Stream(files, form, max_bad_fraction, num_workers, decoded)
    arrays.check_available(files.split, gib, max_gib)
    if decoded:
        return folder.without_bad(decoded.tensor(), files, decoded.bad)
    return folder.read(files, form, max_bad_fraction)
