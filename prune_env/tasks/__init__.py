"""What is pruned: data sets with their splits, the networks, and the training that makes them dense.

From raw to ready: `sources` reads files, `images` holds splits, `datasets` names them; `networks` names the networks,
`weights` reads and writes their tensors; `training` is the one training loop, `dense` caches what it made, and `task`
puts all of it together. Nothing here knows about pruning.
"""
