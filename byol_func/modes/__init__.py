"""What `--mode` does: each mode is one function of a run, in a file of its own.

Nothing is imported here, so that a mistake in a flag is told before torch is loaded.
"""

# Mode -> module and function. These end with a summary.
MEASURING = {
    'pretrain': 'pretrain.pretrain',
    'linear_eval': 'on_top.linear_eval',
    'fine_tune': 'on_top.fine_tune',
    'eval': 'evaluate.evaluate',
    'knn': 'on_features.run_knn',
    'logistic': 'on_features.run_logistic',
}
# These train and measure nothing: no summary.
TOOLS = {
    'preview': 'preview.preview',
    'import': 'import_checkpoint.import_checkpoint',
    'export': 'export.export',
    'replay': 'replay.replay',
    'embed': 'embed.embed',
}
MODES = (*MEASURING, *TOOLS)
TRAINING_MODES = ('pretrain', 'linear_eval', 'fine_tune')  # They have checkpoints of their own.
EXPORT_FORMATS = ('official', 'module', 'timm', 'torchvision', 'safetensors')
