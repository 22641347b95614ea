//! Ports that are published and withdrawn while the card runs.
//!
//! As long as nobody has given the card security groups of his own, its only group lets everybody
//! reach what is published, and follows: to forward a port is to want it reached. Groups that
//! somebody wrote, at the start or later, are left as they are.
//!
//! A withdrawn port takes no more; connections through it go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::NetDevice;
use crate::host::publish::{PUBLISHED_MAX, PublishError, Published, Rule, Transport};
use crate::policy::groups::GroupsSpec;

/// How long a withdrawn port's socket is waited for: the queues' threads let it go in their next
/// round.
const RELEASE: Duration = Duration::from_millis(200);

/// The default groups: everything out, in only to these ports.
#[must_use]
pub fn default_groups(rules: impl IntoIterator<Item = Rule>) -> GroupsSpec {
    let mut groups = GroupsSpec::default();
    for rule in rules {
        let protocol = match rule.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        groups.allow_published(protocol, rule.guest_port);
    }
    groups
}

/// See the module.
#[derive(Debug)]
pub struct Publisher {
    device: Arc<NetDevice>,
    has_default_groups: AtomicBool,
}

impl Publisher {
    /// For a card that has the default groups, or somebody's.
    #[must_use]
    pub fn new(device: Arc<NetDevice>, has_default_groups: bool) -> Self {
        Self {
            device,
            has_default_groups: AtomicBool::new(has_default_groups),
        }
    }

    /// The groups are somebody's from now on.
    pub fn leave_groups(&self) {
        self.has_default_groups.store(false, Ordering::Relaxed);
    }

    /// Whether the groups let everybody reach what is published.
    #[must_use]
    pub fn has_default_groups(&self) -> bool {
        self.has_default_groups.load(Ordering::Relaxed)
    }

    /// What is published.
    #[must_use]
    pub fn rules(&self) -> Vec<Rule> {
        let rules = |ports: &[Arc<Published>]| ports.iter().map(|it| it.rule()).collect();
        self.device.published(rules)
    }

    /// Publishes a port; with the host's port that the kernel chose if the rule leaves it open.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub fn add(&self, rule: Rule) -> Result<Rule, PublishError> {
        let rules = self.rules();
        if rules.len() >= PUBLISHED_MAX {
            return Err(PublishError::TooMany);
        }
        let is_same = |old: &Rule| (old.host, old.transport) == (rule.host, rule.transport);
        if rules.iter().any(is_same) {
            return Err(PublishError::Twice(rule));
        }
        let port = Published::open(rule)?;
        let rule = port.rule();
        self.device.publish(|ports| ports.push(Arc::new(port)));
        self.follow();
        Ok(rule)
    }

    /// Publishes a port no longer.
    ///
    /// # Errors
    /// [`PublishError::Missing`].
    pub fn remove(&self, rule: Rule) -> Result<(), PublishError> {
        let take = |ports: &mut Vec<Arc<Published>>| {
            let at = ports.iter().position(|port| port.rule() == rule)?;
            Some(ports.remove(at))
        };
        let port = self
            .device
            .publish(take)
            .ok_or(PublishError::Missing(rule))?;
        self.follow();
        // So that the port can be had again at once.
        let pause = Duration::from_millis(2);
        let mut waited = Duration::ZERO;
        while Arc::strong_count(&port) > 1 && waited < RELEASE {
            std::thread::sleep(pause);
            waited += pause;
        }
        Ok(())
    }

    fn follow(&self) {
        if !self.has_default_groups() {
            return;
        }
        if let Some(groups) = self.device.rules()
            && let Err(error) = groups.replace(default_groups(self.rules()))
        {
            tracing::error!(%error, "the default groups cannot follow the published ports");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locals::LocalOptions;
    use crate::policy::SharedRules;
    use crate::spec::Spec;
    use crate::stack::Settings;

    fn publisher(has_default_groups: bool) -> Publisher {
        let rules = SharedRules::new(GroupsSpec::default()).unwrap();
        let local = LocalOptions {
            rules: Some(Arc::new(rules)),
            ..LocalOptions::default()
        };
        let device = NetDevice::new(Spec::default(), Settings::default(), local, 1);
        Publisher::new(Arc::new(device), has_default_groups)
    }

    fn open_ports(publisher: &Publisher) -> Vec<String> {
        let report = publisher.device.rules().unwrap().report();
        let ingress = report.iter().filter(|it| it.direction == "ingress");
        ingress.filter_map(|it| it.rule.ports.clone()).collect()
    }

    #[test]
    fn a_port_comes_and_goes_with_the_rule_that_lets_it_be_reached() {
        let publisher = publisher(true);
        let web = publisher.add("0:80".parse().unwrap()).unwrap();
        let name = publisher.add("0:53/udp".parse().unwrap()).unwrap();
        assert!(web.host.port() != 0 && name.host.port() != 0);
        assert_eq!(publisher.rules(), [web, name]);
        assert_eq!(open_ports(&publisher), ["80", "53"]);
        let twice = publisher.add(web).unwrap_err();
        assert!(matches!(twice, PublishError::Twice(_)), "{twice}");
        publisher.remove(web).unwrap();
        assert_eq!(open_ports(&publisher), ["53"]);
        let gone = publisher.remove(web).unwrap_err();
        assert!(matches!(gone, PublishError::Missing(_)), "{gone}");
        // It is free again at once.
        assert_eq!(publisher.add(web).unwrap(), web);
    }

    #[test]
    fn groups_that_somebody_wrote_stay_as_they_are() {
        let publisher = publisher(true);
        publisher.leave_groups();
        publisher.add("0:80".parse().unwrap()).unwrap();
        assert_eq!(open_ports(&publisher), [""; 0]);
    }

    #[test]
    fn there_is_a_bound() {
        let publisher = publisher(false);
        for _ in 0..PUBLISHED_MAX {
            publisher.add("0:80/udp".parse().unwrap()).unwrap();
        }
        let one_more = publisher.add("0:80/udp".parse().unwrap()).unwrap_err();
        assert!(matches!(one_more, PublishError::TooMany), "{one_more}");
    }
}
