//! The control plane's binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_control::cli::main()
}
