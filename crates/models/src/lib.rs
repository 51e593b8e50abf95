//! Hybrid sequence models: configuration, data, training, generation, checkpoints
