"""Judging the images of dense and sparse models: distances, denoising loss, reports (the extra ``quality``)."""
