"""What blocks compute on the calibration samples, as second moments.

Takes a model, `Samples` and the blocks to look at; gives the segments that they stand in (`plan`), the `BlockMoments`
of each block for one variant as the samples are walked through the segments, and how much the model's output minds an
error of each (`output_metrics`, `activation_gradients`). Nothing of the model is changed.
"""
