//! The CPU time of the whole machine: what a proxy costs is not only in its own process.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// CPU time since the machine started, over all CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuTime {
    /// In user space, the kernel and its interrupts.
    pub(crate) busy: Duration,
    /// Taken by the hypervisor for others.
    pub(crate) stolen: Duration,
}

impl CpuTime {
    /// By now.
    pub(crate) fn now() -> Result<Self> {
        parse(&fs::read_to_string("/proc/stat")?).context("/proc/stat has no line of all CPUs")
    }

    /// What has passed since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            busy: self.busy.saturating_sub(before.busy),
            stolen: self.stolen.saturating_sub(before.stolen),
        }
    }
}

/// proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal, in 1/100 s.
fn parse(stat: &str) -> Option<CpuTime> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields = line.split_ascii_whitespace().map(|field| field.parse().ok());
    let ticks: Vec<u64> = fields.collect::<Option<_>>()?;
    let &[user, nice, system, _idle, _iowait, irq, softirq, stolen] = ticks.first_chunk()?;
    let time = |ticks: u64| Duration::from_millis(10 * ticks);
    Some(CpuTime { busy: time(user + nice + system + irq + softirq), stolen: time(stolen) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy() {
        let stat = "cpu  1 20 300 4000 50000 6 70 8 1 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n";
        let expected =
            CpuTime { busy: Duration::from_millis(3970), stolen: Duration::from_millis(80) };
        assert_eq!(parse(stat), Some(expected));
        assert_eq!(parse("cpu0 1 2 3 4 5 6 7 8\n"), None);
        assert!(CpuTime::now().unwrap().busy > Duration::ZERO);
    }
}
