//! The command line of the benchmarks.

use anyhow::Result;
use clap::{Parser, Subcommand};
use offload_benches::{blk, net, noisy, scale};

/// Benchmarks of the offload cards against peers
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The block card against qemu-storage-daemon, plain and LUKS, and against fio on the plain file
    Blk(blk::Options),
    /// The network card against passt, without a guest
    Net(net::Options),
    /// A volume beside a noisy neighbour, with and without a limit on the neighbour
    Noisy(noisy::Options),
    /// The block card on a very large volume: memory, reads that miss its cache, time to open
    Scale(scale::Options),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Blk(options) => blk::run(&options),
        Command::Net(options) => net::run(&options),
        Command::Noisy(options) => noisy::run(&options),
        Command::Scale(options) => scale::run(&options),
    }
}
