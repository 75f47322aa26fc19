//! Requests over connections that stay, by wrk.

use std::net::SocketAddr;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::Netns;

/// What wrk says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) requests: u64,
    /// Per second.
    pub(crate) rate: f64,
    /// Of a request's duration, in µs.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Runs it to its end.
pub(crate) fn run(
    client: &Netns,
    to: SocketAddr,
    connections: u16,
    seconds: u64,
) -> Result<Report> {
    let cpus = thread::available_parallelism()?.get();
    let threads = cpus.min(connections.into()).to_string();
    let (connections, duration) = (connections.to_string(), format!("{seconds}s"));
    let url = format!("http://{to}/");
    let text = client.output(
        "wrk",
        &[
            "--latency",
            "-t",
            &threads,
            "-c",
            &connections,
            "-d",
            &duration,
            "--timeout",
            "10s",
            &url,
        ],
    )?;
    parse(&text).with_context(|| text)
}

/// Any error that wrk counts makes its numbers those of something else.
fn parse(text: &str) -> Result<Report> {
    ensure!(!text.contains("Socket errors") && !text.contains("Non-2xx"), "wrk met errors");
    let after = |label: &str| {
        let rest = text.lines().find_map(|line| line.trim().strip_prefix(label));
        rest.map(str::trim).with_context(|| format!("wrk prints no {label}"))
    };
    let latency = |label| microseconds(after(label)?).context("a latency of wrk");
    let count = text.lines().find_map(|line| line.trim().split_once(" requests in "));
    let (requests, _) = count.context("wrk prints no count")?;
    Ok(Report {
        requests: requests.parse()?,
        rate: after("Requests/sec:")?.parse()?,
        p50: latency("50%")?,
        p99: latency("99%")?,
    })
}

fn microseconds(text: &str) -> Option<f64> {
    // The longer units first: `s` ends them all.
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];
    let (number, factor) =
        units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Running 5s test @ http://10.77.2.2:8080/
  2 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   655.33us  297.30us   6.28ms   75.55%
    Req/Sec    48.83k     2.45k   53.44k    62.00%
  Latency Distribution
     50%  617.00us
     75%  790.00us
     90%    1.01ms
     99%    1.53ms
  485874 requests in 5.00s, 76.92MB read
Requests/sec:  97146.28
Transfer/sec:     15.38MB
";

    #[test]
    fn a_report_is_read() {
        let expected = Report { requests: 485_874, rate: 97_146.28, p50: 617.0, p99: 1530.0 };
        assert_eq!(parse(TEXT).unwrap(), expected);
    }

    #[test]
    fn errors_are_not_overlooked() {
        let errors =
            TEXT.replace("Requests/sec", "  Socket errors: connect 0, read 3\nRequests/sec");
        assert!(parse(&errors).is_err());
        let errors = TEXT.replace("Requests/sec", "  Non-2xx or 3xx responses: 1\nRequests/sec");
        assert!(parse(&errors).is_err());
        assert!(parse("unable to connect").is_err());
    }

    #[test]
    fn units() {
        assert_eq!(
            ["1.5us", "1.5ms", "1.5s", "1.5"].map(microseconds),
            [Some(1.5), Some(1.5e3), Some(1.5e6), None]
        );
    }
}
