//! One measurement: a load on a subject, and what it cost the machine.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::cpu::CpuTime;
use super::load::{bulk, churn, server, wrk};
use super::plan::{Load, Quantity, Route};
use super::subjects::Subject;
use super::{memory, scale};

const KB: f64 = 1024.0;
const MB: f64 = 1024.0 * KB;

/// What passes before the first byte counts: windows grow, buffers fill.
const WARM_UP: Duration = Duration::from_millis(500);
const STREAMS_BESIDE: u8 = 4;
/// Longer than a connection is in TIME_WAIT, which is a minute.
const SUSTAINED: Duration = Duration::from_secs(65);
/// Seconds.
const SUSTAINED_PART: usize = 13;

/// What one measurement says of one quantity.
pub(crate) struct Reading {
    /// Which part of the measurement; 0 if it has only one.
    pub(crate) part: usize,
    pub(crate) quantity: Quantity,
    pub(crate) value: f64,
}

/// Measures for so many seconds.
pub(crate) fn measure(
    load: Load,
    subject: &Subject,
    route: Route,
    seconds: u64,
) -> Result<Vec<Reading>> {
    let endpoint = subject.endpoint(route).context("it has no server there")?;
    let client = &subject.client;
    let http = SocketAddr::new(endpoint.dialled, server::PORT);
    let length = Duration::from_secs(seconds);
    match load {
        Load::Bulk { streams } => bulk::during(client, endpoint.dialled, streams, || {
            thread::sleep(WARM_UP);
            let (bytes, cpu, begin) = (endpoint.sink.received(), CpuTime::now()?, Instant::now());
            thread::sleep(length);
            let bytes = endpoint.sink.received() - bytes;
            let (cpu, elapsed) = (CpuTime::now()?.since(cpu).busy, begin.elapsed());
            let gbit = bytes as f64 * 8e-9;
            ensure!(bytes > 0, "nothing arrived");
            Ok(readings([
                (Quantity::Rate, gbit / elapsed.as_secs_f64()),
                (Quantity::Cpu, cpu.as_secs_f64() * 1e3 / gbit),
            ]))
        }),
        Load::KeepAlive { connections } => {
            let cpu = CpuTime::now()?;
            let report = wrk::run(client, http, connections, seconds)?;
            let cpu = CpuTime::now()?.since(cpu).busy;
            Ok(readings([
                (Quantity::Rate, report.rate),
                (Quantity::Cpu, cpu.as_secs_f64() * 1e6 / report.requests as f64),
                (Quantity::P50, report.p50),
                (Quantity::P99, report.p99),
            ]))
        }
        Load::New { closes } => {
            let cpu = CpuTime::now()?;
            let churn = churn::run(client, http, closes, length)?;
            let cpu = CpuTime::now()?.since(cpu).busy;
            let connections = churn.connections as f64;
            Ok(readings([
                (Quantity::Rate, connections / churn.elapsed.as_secs_f64()),
                (Quantity::Cpu, cpu.as_secs_f64() * 1e6 / connections),
                (Quantity::P50, churn.p50.into()),
                (Quantity::P99, churn.p99.into()),
            ]))
        }
        Load::Sustained { closes } => {
            let churn = churn::run(client, http, closes, SUSTAINED)?;
            let parts = churn.by_second.chunks(SUSTAINED_PART);
            let rate = |counts: &[u32]| f64::from(counts.iter().sum::<u32>()) / counts.len() as f64;
            Ok(parts_of(Quantity::Rate, parts.map(rate)))
        }
        Load::Beside => bulk::during(client, endpoint.dialled, STREAMS_BESIDE, || {
            thread::sleep(WARM_UP);
            let report = wrk::run(client, http, 1, seconds)?;
            Ok(readings([(Quantity::P50, report.p50), (Quantity::P99, report.p99)]))
        }),
        Load::Held => {
            let held = memory::hold(subject)?;
            Ok(readings([
                (Quantity::Count, held.connections as f64),
                (Quantity::Idle, held.idle as f64 / MB),
                (Quantity::Memory, held.per_connection as f64 / KB),
                (Quantity::Left, held.left as f64 / MB),
            ]))
        }
        Load::Enrolment => Ok(times(&scale::first_bytes()?)),
        Load::Crowd => Ok(times(&scale::crowd()?)),
        Load::Remote => Ok(readings([(Quantity::Memory, scale::remote_workloads()? as f64 / MB)])),
    }
}

fn readings<const N: usize>(values: [(Quantity, f64); N]) -> Vec<Reading> {
    values.map(|(quantity, value)| Reading { part: 0, quantity, value }).into()
}

/// One after the other, of one quantity.
fn parts_of(quantity: Quantity, values: impl Iterator<Item = f64>) -> Vec<Reading> {
    values.enumerate().map(|(part, value)| Reading { part, quantity, value }).collect()
}

fn times(times: &[Duration]) -> Vec<Reading> {
    parts_of(Quantity::Time, times.iter().map(|time| time.as_secs_f64() * 1e3))
}

/// What share of the machine was not idle, or stolen, while nothing was measured.
pub(crate) fn background(length: Duration) -> Result<f64> {
    let (before, begin) = (CpuTime::now()?, Instant::now());
    thread::sleep(length);
    let passed = CpuTime::now()?.since(before);
    let cpus = thread::available_parallelism()?.get() as f64;
    Ok((passed.busy + passed.stolen).as_secs_f64() / begin.elapsed().as_secs_f64() / cpus)
}
