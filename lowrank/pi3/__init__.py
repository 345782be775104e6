"""The π³ model of visual geometry from checkpoint to evaluation: points and camera poses from views of a scene.

- `model`: `Pi3`, the model; `Pi3Config`, its sizes.
- `blocks`: attention with rotary positions, MLP and transformer block.
- `encoder`: from images to the tokens of their patches.
- `heads`: from tokens to points, confidence and camera poses.
- `checkpoint`: `load_pi3`, weights from a file, a folder or the Hub.
- `loss`: the training loss, distillation from a teacher, and a loss for Fisher information.
- `small`: the small π³ of the embedded report, and its training data.
- `pretraining`: how it is trained; `pretrain`: train it: `python -m lowrank.pi3.pretrain`.
- `frames`: images and videos as views in a size that the model takes.
- `data`: `load_scenes` and `rendered_scenes`, sequences with depth and poses; `Scene`.
- `layouts`: `LAYOUTS`, the published data sets on disk.
- `layout_files`: `Frame`, the files of one view; read depth and pose files.
- `sintel`: the files of MPI Sintel.
- `tum`: the files of TUM RGB-D and Bonn.
- `scenes`: `render_scene`, rooms of boxes and balls with exact depth and poses; `SPLIT_SEEDS`, which are in which split.
- `solids`: the textured rooms, boxes and balls, and the rays that hit them.
- `calibration`: `load_source`, the scenes of a split; windows of views and batches of images for calibration.
- `evaluation`: `evaluate_pi3`, metrics of four tasks over sequences; `PROTOCOLS`.
- `predictions`: `predict`, the outputs of one pass; bring depth and points to another size.
- `metrics`: errors of depth, poses and points.
- `speed`: time a forward pass, by the published protocol and by a fair one.
- `flops`: `pi3_macs`, the cost of a forward pass by formula.
- `adaptive`: `AdaptiveRank`, ranks that depend on the entropy of the images.
"""
