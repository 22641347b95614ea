//! vhost-blk
