//! A packet filter that is installed many times: written as text, compiled once by nft, copied from then on.
//!
//! Running nft takes 3 ms on an idle machine and, being a new process, 10 to 20 ms on a busy one; handing the kernel
//! what it once made of the text takes a tenth of a millisecond. So nft loads the text into a namespace that is thrown
//! away, the result is read back, and every router gets a copy. Whether copies are faithful is checked when it is
//! compiled; if a kernel's are not, nft is run each time instead.

use std::io;

use nix::sched::{CloneFlags, unshare};

use super::error::NetworkError;
use super::netfilter::{Attributes, Kind, Netfilter};
use super::nft::{Loading, Nft};

const TABLE_NAME: u16 = 1;
const CHAIN_ATTRIBUTES: [u16; 5] = [1, 3, 4, 5, 7]; // table, name, hook, policy, type
const RULE_ATTRIBUTES: [u16; 4] = [1, 2, 4, 7]; // table, chain, expressions, user data
// Table, name, flags, key type and size, policy, size, user data.
const SET_ATTRIBUTES: [u16; 8] = [1, 2, 3, 4, 5, 8, 9, 13];
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_ID: u16 = 10;
const ELEMENTS_ATTRIBUTES: [u16; 3] = [1, 2, 3]; // table, set, elements
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;

/// The one table of a packet filter, ready to be put into any namespace.
#[derive(Debug)]
pub(super) struct Ruleset {
    table: &'static str,
    text: String,
    /// What makes it; `None` where copies cannot be trusted.
    compiled: Option<Vec<(Kind, Attributes)>>,
}

impl Ruleset {
    /// Compiles `text`, which defines `table` of the family `inet` with named sets only. Leaves the calling thread in a
    /// namespace that nobody else has.
    pub(super) fn compile(nft: &Nft, table: &'static str, text: String) -> Result<Self, NetworkError> {
        enter_new_namespace()?;
        nft.load("compile the packet filter", &text)?.finish()?;
        let original = read().map_err(failed("read the compiled packet filter"))?;
        enter_new_namespace()?;
        let mut ruleset = Self { table, text, compiled: Some(original) };
        let copy = ruleset.copy_in().and_then(|()| read());
        match copy {
            Ok(copy) if ruleset.compiled.as_ref() == Some(&copy) => {}
            outcome => {
                tracing::warn!(error = ?outcome.err(), "packet filters cannot be copied on this kernel; nft is run");
                ruleset.compiled = None;
            }
        }
        Ok(ruleset)
    }

    /// Puts the table into the calling thread's namespace, which has none of that name yet. What comes back is to be
    /// waited for, after whatever else there is to do.
    pub(super) fn install(&self, nft: &Nft) -> Result<Option<Loading>, NetworkError> {
        self.put(nft, "install a sandbox's packet filter", Self::copy_in)
    }

    /// Like [`install`](Self::install), in one step with the removal of the table that is there. The kernel waits for
    /// its readers then: 10 ms or more.
    pub(super) fn replace(&self, nft: &Nft) -> Result<Option<Loading>, NetworkError> {
        self.put(nft, "replace a sandbox's packet filter", |ruleset| {
            let table = ruleset.table();
            // Made first, so that there is one to delete.
            ruleset.transact(vec![(Kind::NewTable, table.clone()), (Kind::DeleteTable, table)])
        })
    }

    fn put(
        &self,
        nft: &Nft,
        step: &'static str,
        copy: impl FnOnce(&Self) -> io::Result<()>,
    ) -> Result<Option<Loading>, NetworkError> {
        if self.compiled.is_none() {
            return nft.load(step, &self.text).map(Some);
        }
        copy(self).map_err(failed(step))?;
        Ok(None)
    }

    fn copy_in(&self) -> io::Result<()> {
        self.transact(Vec::new())
    }

    fn transact(&self, mut changes: Vec<(Kind, Attributes)>) -> io::Result<()> {
        changes.push((Kind::NewTable, self.table()));
        changes.extend(self.compiled.iter().flatten().cloned());
        Netfilter::open()?.transact(&changes)
    }

    fn table(&self) -> Attributes {
        Attributes::default().with_text(TABLE_NAME, self.table)
    }
}

fn enter_new_namespace() -> Result<(), NetworkError> {
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|errno| NetworkError::Namespace { step: "unshare the network namespace", source: errno.into() })
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Netlink { step: step.to_owned(), source }
}

/// Everything in the calling thread's packet filter, in an order in which it can be made again.
fn read() -> io::Result<Vec<(Kind, Attributes)>> {
    let mut netfilter = Netfilter::open()?;
    let mut changes = Vec::new();
    let mut elements = Vec::new();
    for (number, set) in (1u32..).zip(netfilter.dump(Kind::GetSet, &Attributes::default())?) {
        let (Some(table), Some(name)) = (set.get(SET_TABLE), set.get(SET_NAME)) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let request = Attributes::default().with(ELEMENTS_TABLE, table).with(ELEMENTS_SET, name);
        elements.extend(netfilter.dump(Kind::GetElements, &request)?);
        // The number is only needed within the transaction, but the kernel insists on it.
        changes.push((Kind::NewSet, set.keep(&SET_ATTRIBUTES).with(SET_ID, &number.to_be_bytes())));
    }
    changes.extend(elements.iter().map(|list| (Kind::NewElements, list.keep(&ELEMENTS_ATTRIBUTES))));
    // Rules jump to chains, so all chains come first.
    for chain in netfilter.dump(Kind::GetChain, &Attributes::default())? {
        changes.push((Kind::NewChain, chain.keep(&CHAIN_ATTRIBUTES)));
    }
    for rule in netfilter.dump(Kind::GetRule, &Attributes::default())? {
        changes.push((Kind::NewRule, rule.keep(&RULE_ATTRIBUTES)));
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::network::config::Egress;
    use crate::network::config::{InstanceName, NetworkConfig};
    use crate::network::rules::{ROUTER_TABLE, router_rules};

    /// Runs a test on a thread that may end in any namespace.
    fn on_a_thread_of_its_own(test: impl FnOnce(Nft) + Send + 'static) {
        if !nix::unistd::geteuid().is_root() {
            // Past the test harness, which would keep the line of a test that passes to itself.
            let _ = writeln!(io::stderr(), "SKIPPED: needs root");
            return;
        }
        let nft = Nft::find().expect("nft is installed");
        if let Err(panic) = std::thread::spawn(move || test(nft)).join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn rules() -> String {
        let config = NetworkConfig {
            allowed_exceptions: vec!["10.1.2.0/24".parse().expect("a network")],
            ..NetworkConfig::new(InstanceName::new("test").expect("a valid name"))
        };
        router_rules(&config, Egress::Internet)
    }

    fn listing(nft: &Nft) -> String {
        nft.query("list", &["list", "ruleset"]).expect("a listing")
    }

    #[test]
    fn a_copy_reads_like_the_original() {
        on_a_thread_of_its_own(|nft| {
            let ruleset = Ruleset::compile(&nft, ROUTER_TABLE, rules()).expect("compiled");
            assert!(ruleset.compiled.is_some(), "this kernel's packet filters cannot be copied");
            enter_new_namespace().expect("a namespace");
            nft.load("load", &rules()).expect("started").finish().expect("loaded");
            let original = listing(&nft);
            assert!(original.contains("10.1.2.0/24") && original.contains("masquerade"), "{original}");

            // Into an empty namespace, and in place of an older table with other rules.
            enter_new_namespace().expect("a namespace");
            assert!(ruleset.install(&nft).expect("installed").is_none());
            assert_eq!(listing(&nft), original);
            nft.load("add", "add chain inet belljar older\n").expect("started").finish().expect("loaded");
            assert_ne!(listing(&nft), original);
            assert!(ruleset.replace(&nft).expect("replaced").is_none());
            assert_eq!(listing(&nft), original);
        });
    }

    #[test]
    fn without_copies_nft_does_it() {
        on_a_thread_of_its_own(|nft| {
            let ruleset = Ruleset { table: ROUTER_TABLE, text: rules(), compiled: None };
            enter_new_namespace().expect("a namespace");
            ruleset.install(&nft).expect("started").expect("something to wait for").finish().expect("loaded");
            let original = listing(&nft);
            assert!(original.contains("masquerade"), "{original}");
            nft.load("add", "add chain inet belljar older\n").expect("started").finish().expect("loaded");
            ruleset.replace(&nft).expect("started").expect("something to wait for").finish().expect("loaded");
            assert_eq!(listing(&nft), original);
        });
    }

    #[test]
    fn a_refused_copy_is_an_error_and_changes_nothing() {
        on_a_thread_of_its_own(|nft| {
            let mut ruleset = Ruleset::compile(&nft, ROUTER_TABLE, rules()).expect("compiled");
            enter_new_namespace().expect("a namespace");
            let broken = Attributes::default().with_text(1, ROUTER_TABLE).with_text(2, "no such chain");
            ruleset.compiled.as_mut().expect("copies").insert(1, (Kind::NewRule, broken));
            assert!(ruleset.install(&nft).is_err());
            assert_eq!(listing(&nft), "");
        });
    }

    #[test]
    fn text_that_nft_refuses_is_an_error_with_its_words() {
        on_a_thread_of_its_own(|nft| {
            let error = Ruleset::compile(&nft, ROUTER_TABLE, "table inet belljar {\n nonsense\n}\n".to_owned())
                .expect_err("nonsense");
            assert!(error.to_string().contains("syntax error"), "{error}");
        });
    }
}
