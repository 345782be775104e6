"""Errors of predicted depth, camera poses and points by the published protocols, in float64.

The scale of predictions is free, and so is the frame of poses and points. They are aligned with the truth first.

- `alignment`: fit rotations and similarities to corresponding points.
- `depth`: `depth_metrics`, errors of depth; `ALIGNMENTS`, functions that fit its scale and shift.
- `poses`: errors of trajectories, and angles between relative poses.
- `points`: `point_metrics`, errors of point clouds and of their normals.
"""
