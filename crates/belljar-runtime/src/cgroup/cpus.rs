//! Lists of CPUs as the kernel writes them: `0-3,8`.

use std::fmt;
use std::str::FromStr;

/// CPUs by number, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(Vec<u32>);

/// The text is not a list of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a list of CPUs")]
pub struct InvalidCpuList {
    text: String,
}

/// No machine has more; a bound on what a bad text could make us allocate.
const MOST_CPUS: u32 = 65_536;

impl CpuList {
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `count` of these, from the `offset`th on and around the end; all if there are not so many.
    #[must_use]
    pub fn take_from(&self, offset: usize, count: usize) -> Self {
        let mut taken: Vec<u32> =
            self.0.iter().cycle().skip(offset % self.len().max(1)).take(count.min(self.len())).copied().collect();
        taken.sort_unstable();
        Self(taken)
    }
}

impl FromStr for CpuList {
    type Err = InvalidCpuList;

    fn from_str(text: &str) -> Result<Self, InvalidCpuList> {
        let invalid = || InvalidCpuList { text: text.to_owned() };
        let number = |text: &str| text.parse::<u32>().map_err(|_| invalid());
        let mut cpus = Vec::new();
        for range in text.trim().split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (number(first)?, number(last)?);
            if last >= MOST_CPUS {
                return Err(invalid());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, cpu) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(",")?;
            }
            write!(f, "{cpu}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().expect("a list")
    }

    #[test]
    fn reads_and_writes_what_the_kernel_does() {
        assert_eq!(list("0-3,8\n").to_string(), "0,1,2,3,8");
        assert_eq!(list("").len(), 0);
        assert_eq!(list("5,1-2,2").to_string(), "1,2,5");
        for text in ["a", "1-", "0-4000000000", "-1"] {
            assert!(text.parse::<CpuList>().is_err(), "{text} passed");
        }
    }

    #[test]
    fn takes_around_the_end() {
        assert_eq!(list("0-3").take_from(3, 2).to_string(), "0,3");
        assert_eq!(list("0-3").take_from(9, 1).to_string(), "1");
        assert_eq!(list("0-1").take_from(1, 5).to_string(), "0,1");
        assert_eq!(list("").take_from(1, 5).to_string(), "");
    }
}
