//! What the sandbox uses, as its own kernel tells it.

use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use belljar_protocol::envd::rest::Metrics;
use rustix::fs::statvfs;
use time::OffsetDateTime;

const MIB: u64 = 1 << 20;

/// Remembers the processor times of one reading for the next.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    last: Mutex<CpuTimes>,
}

/// Ticks since boot, of all cores together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTimes {
    busy: u64,
    total: u64,
}

impl Meter {
    /// Blocking.
    pub(crate) fn read(&self) -> io::Result<Metrics> {
        let cpu = CpuTimes::parse(&fs::read_to_string("/proc/stat")?);
        let memory = Memory::parse(&fs::read_to_string("/proc/meminfo")?);
        let disk = statvfs("/")?;
        let last = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), cpu);
        let disk_total = disk.f_blocks.saturating_mul(disk.f_frsize);
        Ok(Metrics {
            ts: OffsetDateTime::now_utc().unix_timestamp(),
            cpu_count: std::thread::available_parallelism().map_or(1, |count| count.get().try_into().unwrap_or(1)),
            cpu_used_pct: cpu.percent_since(last),
            mem_total: memory.total,
            mem_used: memory.used,
            mem_cache: memory.cache,
            mem_total_mib: memory.total / MIB,
            mem_used_mib: memory.used / MIB,
            disk_used: disk_total.saturating_sub(disk.f_bavail.saturating_mul(disk.f_frsize)),
            disk_total,
        })
    }
}

impl CpuTimes {
    /// The line `cpu user nice system idle iowait irq softirq steal …`.
    fn parse(stat: &str) -> Self {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
        // The last two fields, guest times, are part of the first two.
        let times: Vec<u64> = line.split_whitespace().take(8).filter_map(|field| field.parse().ok()).collect();
        let total = times.iter().sum();
        let idle: u64 = times.iter().skip(3).take(2).sum();
        Self { busy: total - idle, total }
    }

    /// Rounded to two places.
    fn percent_since(self, last: Self) -> f32 {
        let total = self.total.saturating_sub(last.total);
        if total == 0 {
            return 0.0;
        }
        let busy = self.busy.saturating_sub(last.busy).min(total);
        let hundredths = u16::try_from(u128::from(busy) * 10_000 / u128::from(total)).unwrap_or(10_000);
        f32::from(hundredths) / 100.0
    }
}

/// Bytes.
#[derive(Debug, PartialEq, Eq)]
struct Memory {
    total: u64,
    used: u64,
    cache: u64,
}

impl Memory {
    fn parse(meminfo: &str) -> Self {
        let bytes = |name: &str| {
            let value = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.and_then(|value| value.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        let (total, free) = (bytes("MemTotal"), bytes("MemFree"));
        let cache = bytes("Cached") + bytes("SReclaimable");
        Self { total, used: total.saturating_sub(free + cache + bytes("Buffers")), cache }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_use_is_between_two_readings() {
        let first = CpuTimes::parse("cpu  100 0 100 800 0 0 0 0 50 0\ncpu0 1 1 1 1\n");
        assert_eq!(first, CpuTimes { busy: 200, total: 1000 });
        let second = CpuTimes::parse("cpu  150 0 125 900 25 0 0 0 75 0\n");
        assert!((second.percent_since(first) - 37.5).abs() < f32::EPSILON);
        assert!(second.percent_since(second).abs() < f32::EPSILON);
        assert_eq!(CpuTimes::parse("nothing"), CpuTimes::default());
    }

    #[test]
    fn memory_in_use_is_what_could_not_be_given_back() {
        let text = "MemTotal:  1000 kB\nMemFree:  300 kB\nBuffers: 50 kB\nCached:  200 kB\nSReclaimable: 50 kB\n";
        assert_eq!(Memory::parse(text), Memory { total: 1000 << 10, used: 400 << 10, cache: 250 << 10 });
        assert_eq!(Memory::parse(""), Memory { total: 0, used: 0, cache: 0 });
    }

    #[test]
    fn this_machine_can_be_measured() {
        let metrics = Meter::default().read().expect("readable");
        assert!(metrics.mem_total > metrics.mem_used && metrics.mem_used > 0);
        assert!(metrics.disk_total > 0 && metrics.cpu_count > 0);
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct));
    }
}
