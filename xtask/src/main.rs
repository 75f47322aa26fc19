//! Developer commands: `cargo xtask --help` lists them.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod commands;
mod demo;
mod deploy;
mod e2e;
mod image;
mod pod;
mod vm;

#[derive(Parser)]
#[command(about = "Builds, tests and demonstrates nodemesh", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the agent, with its eBPF programs, and the control plane.
    Build {
        /// Build what is to be deployed, linked statically, not what the laboratory uses.
        #[arg(long)]
        release: bool,
    },
    /// Run every test: unit tests, then the laboratory's with the real binaries. Needs root.
    Test {
        /// Run only laboratory tests, those whose name contains this.
        #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "")]
        lab: Option<String>,
        /// Run laboratory tests on the distribution's kernel, in an emulated machine.
        #[arg(long)]
        vm: bool,
        /// How many tests run at a time.
        #[arg(long, default_value_t = 2)]
        threads: u8,
    },
    /// Watch two nodes and four pods with and without the mesh. Needs root.
    Demo,
    /// Measure the mesh beside plain TCP and other proxies. Needs root.
    Bench(bench::Arguments),
    /// Make the container images: an OCI archive for `ctr -n k8s.io images import`.
    Image {
        /// Where to write it.
        #[arg(default_value = "target/nodemesh.tar")]
        archive: PathBuf,
        /// The images' tag.
        #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
        tag: String,
        /// Do not optimize: quicker to build, slower to run.
        #[arg(long)]
        debug: bool,
        /// Add the image of what `cargo xtask e2e` runs in its pods.
        #[arg(long)]
        with_e2e: bool,
    },
    /// Render the Helm chart as plain manifests, in deploy/manifests. Needs helm.
    Manifests,
    /// Install the chart on the cluster of KUBECONFIG, check it, and remove it.
    E2e(e2e::Arguments),
    /// What runs in the pods of `e2e`.
    #[command(subcommand, hide = true)]
    Pod(pod::Command),
    /// Measure what a large cluster costs, without having one. See docs/scale.md.
    Scale {
        /// `--nodes`, `--pods`, `--services`, `--changes`, `--seconds`, `--streams`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Check formatting, and run clippy over the host crates and the eBPF programs.
    Lint,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    match arguments.verb {
        Verb::Build { release: true } => {
            println!("{}", commands::build_static(true, false)?.display());
            Ok(())
        }
        Verb::Build { release: false } => commands::build(),
        Verb::Test { lab, vm: true, threads } => {
            commands::test_in_vm(lab.as_deref().unwrap_or_default(), threads)
        }
        Verb::Test { lab, vm: false, threads } => commands::test(lab.as_deref(), threads),
        Verb::Demo => {
            commands::prepare_demo()?;
            demo::run()
        }
        Verb::Bench(arguments) if arguments.built => bench::run(&arguments),
        Verb::Bench(_) => commands::become_bench(),
        Verb::Image { archive, tag, debug, with_e2e } => {
            image::write(&commands::build_static(!debug, with_e2e)?, with_e2e, &tag, &archive)
        }
        Verb::Manifests => deploy::render(commands::root()?),
        Verb::E2e(arguments) => e2e::run(&arguments),
        Verb::Pod(command) => pod::run(command),
        Verb::Scale { arguments } => commands::scale(&arguments),
        Verb::Lint => commands::lint(),
    }
}
