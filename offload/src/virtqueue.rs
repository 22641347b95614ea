//! virtqueue
