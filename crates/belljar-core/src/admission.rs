//! Whether the machine has room for one more sandbox: a pure decision over what has been promised.

use crate::limits::Resources;

/// What the machine may promise in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Sum of the memory of all sandboxes, in MiB, overcommit already applied.
    pub memory_mib: u64,
    /// Number of sandboxes.
    pub sandboxes: u32,
    /// Number of sandboxes of one team.
    pub sandboxes_per_team: u32,
    /// The machine's CPUs: no sandbox can have more.
    pub vcpus: u32,
}

/// What is promised at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Promised {
    pub memory_mib: u64,
    pub sandboxes: u32,
    pub sandboxes_of_team: u32,
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the server is full: {promised_mib} of {capacity_mib} MiB of memory are promised, and this sandbox asks for {asked_mib}"
    )]
    Memory { promised_mib: u64, capacity_mib: u64, asked_mib: u32 },
    #[error("the server is full: {limit} sandboxes are running, the most it allows")]
    Sandboxes { limit: u32 },
    #[error("your team has {limit} sandboxes running, the most it may")]
    Team { limit: u32 },
    #[error("the template asks for {asked} virtual CPUs and the machine has {available}")]
    Cpus { asked: u32, available: u32 },
}

impl Refusal {
    /// Whether trying again can help, once something else has ended.
    #[must_use]
    pub fn is_temporary(self) -> bool {
        match self {
            Self::Memory { capacity_mib, asked_mib, .. } => u64::from(asked_mib) <= capacity_mib,
            Self::Sandboxes { .. } | Self::Team { .. } => true,
            Self::Cpus { .. } => false,
        }
    }
}

impl Capacity {
    /// Whether a sandbox with these resources fits beside what is promised.
    ///
    /// # Errors
    /// With what is full.
    pub fn admit(&self, promised: Promised, asked: Resources) -> Result<(), Refusal> {
        if asked.vcpus > self.vcpus {
            return Err(Refusal::Cpus { asked: asked.vcpus, available: self.vcpus });
        }
        if promised.sandboxes_of_team >= self.sandboxes_per_team {
            return Err(Refusal::Team { limit: self.sandboxes_per_team });
        }
        if promised.sandboxes >= self.sandboxes {
            return Err(Refusal::Sandboxes { limit: self.sandboxes });
        }
        if promised.memory_mib + u64::from(asked.memory_mib) > self.memory_mib {
            return Err(Refusal::Memory {
                promised_mib: promised.memory_mib,
                capacity_mib: self.memory_mib,
                asked_mib: asked.memory_mib,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALL: Resources = Resources { vcpus: 1, memory_mib: 512, disk_mib: 1024, processes: 100 };

    proptest! {
        #[test]
        fn promises_never_pass_the_capacity(memory in 0u64..20_000, sandboxes in 0u32..50, asks in prop::collection::vec(1u32..4_000, 0..60)) {
            let capacity = Capacity { memory_mib: memory, sandboxes, sandboxes_per_team: 40, vcpus: 2 };
            let mut promised = Promised::default();
            for memory_mib in asks {
                if capacity.admit(promised, Resources { memory_mib, ..SMALL }).is_ok() {
                    promised.memory_mib += u64::from(memory_mib);
                    promised.sandboxes += 1;
                    promised.sandboxes_of_team += 1;
                }
            }
            prop_assert!(promised.memory_mib <= memory);
            prop_assert!(promised.sandboxes <= sandboxes.min(40));
        }
    }

    #[test]
    fn what_can_never_fit_is_not_worth_a_retry() {
        let capacity = Capacity { memory_mib: 100, sandboxes: 1, sandboxes_per_team: 1, vcpus: 2 };
        let refusal = capacity.admit(Promised::default(), SMALL).expect_err("512 MiB do not fit into 100");
        assert!(!refusal.is_temporary());
    }
}
