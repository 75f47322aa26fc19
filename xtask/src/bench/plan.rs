//! What is measured, in which order.

use super::stats::Bound;

/// Where the server is, seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Route {
    /// On the other node.
    Far,
    /// On the same node.
    Near,
}

/// Who closes a connection first, and so has it in TIME_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum End {
    Client,
    Server,
}

/// What is put on a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Load {
    /// Sends, as much as goes through.
    Bulk { streams: u8 },
    /// One request after the other on each connection.
    KeepAlive { connections: u16 },
    /// A connection for each request.
    New { closes: End },
    /// The same for a minute, so that whatever is used up by then is missed.
    Sustained { closes: End },
    /// Requests on one connection, beside four bulk streams.
    Beside,
    /// Ten thousand connections that do nothing. Before everything else: memory that was needed
    /// once may be kept.
    Held,
    /// A pod that comes into the mesh.
    Enrolment,
    /// A thousand of them on one node.
    Crowd,
    /// Ten thousand of them on other nodes.
    Remote,
}

/// What is measured of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Quantity {
    /// Gbit, requests or connections per second.
    Rate,
    /// Of the whole machine, for each Gbit, request or connection.
    Cpu,
    /// The median of the time that a request takes.
    P50,
    /// Its 99th percentile.
    P99,
    /// How many connections there were.
    Count,
    /// Of a pod, to its first byte or to its certificate.
    Time,
    /// Of the proxy that needs most: before there was a connection.
    Idle,
    /// For each connection, or for all workloads.
    Memory,
    /// What is left when the connections are gone.
    Left,
}

/// A row of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Metric {
    pub(crate) route: Route,
    pub(crate) load: Load,
    pub(crate) quantity: Quantity,
}

/// What nodemesh is to reach: a ratio to plain TCP, or a value of what plain TCP does not have.
pub(crate) struct Goal {
    pub(crate) metric: Metric,
    pub(crate) bound: Bound,
}

impl Load {
    pub(crate) const ALL: [Self; 14] = [
        Self::Held,
        Self::Bulk { streams: 1 },
        Self::Bulk { streams: 4 },
        Self::KeepAlive { connections: 1 },
        Self::KeepAlive { connections: 64 },
        Self::KeepAlive { connections: 256 },
        Self::New { closes: End::Client },
        Self::New { closes: End::Server },
        Self::Sustained { closes: End::Client },
        Self::Sustained { closes: End::Server },
        Self::Beside,
        Self::Enrolment,
        Self::Crowd,
        Self::Remote,
    ];

    /// Its name on the command line and in the results.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Bulk { streams } => format!("bulk-{streams}"),
            Self::KeepAlive { connections } => format!("keepalive-{connections}"),
            Self::New { closes: End::Client } => "new-client-closes".into(),
            Self::New { closes: End::Server } => "new-server-closes".into(),
            Self::Sustained { closes: End::Client } => "sustained-client-closes".into(),
            Self::Sustained { closes: End::Server } => "sustained-server-closes".into(),
            Self::Beside => "beside-bulk".into(),
            Self::Held => "held".into(),
            Self::Enrolment => "enrolment".into(),
            Self::Crowd => "crowd".into(),
            Self::Remote => "remote-workloads".into(),
        }
    }

    /// Whether it is measured once, and not in every round. What takes a minute has parts that
    /// stand for rounds.
    const fn is_once(self) -> bool {
        match self {
            Self::Bulk { .. } | Self::KeepAlive { .. } | Self::New { .. } | Self::Beside => false,
            Self::Sustained { .. } => true,
            Self::Held | Self::Enrolment | Self::Crowd | Self::Remote => true,
        }
    }

    /// Whether plain TCP has it, too, to be compared with.
    pub(crate) const fn is_relative(self) -> bool {
        !matches!(self, Self::Held | Self::Enrolment | Self::Crowd | Self::Remote)
    }

    /// Whether it is of this project alone.
    pub(crate) const fn is_of_mesh(self) -> bool {
        matches!(self, Self::Enrolment | Self::Crowd | Self::Remote)
    }

    /// Whether it is measured on one node, too.
    pub(crate) const fn is_for(self, route: Route) -> bool {
        match route {
            Route::Far => true,
            Route::Near => {
                matches!(self, Self::Bulk { .. } | Self::KeepAlive { connections: 64 })
            }
        }
    }
}

impl Metric {
    /// Its name in the results.
    pub(crate) fn name(self) -> String {
        let quantity = match self.quantity {
            Quantity::Rate => "",
            Quantity::Cpu => " cpu",
            Quantity::P50 => " p50",
            Quantity::P99 => " p99",
            Quantity::Count => " connections",
            Quantity::Time => " time",
            Quantity::Idle => " idle",
            Quantity::Memory => " memory",
            Quantity::Left => " left",
        };
        let route = match self.route {
            Route::Far => "",
            Route::Near => "one-node ",
        };
        format!("{route}{}{quantity}", self.load.name())
    }

    pub(crate) const fn unit(self) -> &'static str {
        match (self.load, self.quantity) {
            (_, Quantity::P50 | Quantity::P99) => "µs",
            (_, Quantity::Count) => "",
            (_, Quantity::Time) => "ms",
            (Load::Held, Quantity::Memory) => "KB/conn",
            (_, Quantity::Idle | Quantity::Memory | Quantity::Left) => "MB",
            (Load::Bulk { .. }, Quantity::Rate) => "Gbit/s",
            (Load::Bulk { .. }, Quantity::Cpu) => "CPU ms/Gbit",
            (Load::New { .. } | Load::Sustained { .. }, Quantity::Rate) => "conn/s",
            (Load::New { .. } | Load::Sustained { .. }, Quantity::Cpu) => "CPU µs/conn",
            (_, Quantity::Rate) => "req/s",
            (_, Quantity::Cpu) => "CPU µs/req",
        }
    }
}

/// The goals of the data path. docs/performance.md lists them all.
pub(crate) fn goals() -> Vec<Goal> {
    use Bound::{AtLeast, AtMost};
    use Quantity::{Cpu, Idle, Left, Memory, P50, P99, Rate, Time};
    use Route::{Far, Near};
    let [held, bulk_1, bulk_4, keepalive_1, keepalive_64, _, rest @ ..] = Load::ALL;
    let [new_client, new_server, long_client, long_server, beside, _, crowd, remote] = rest;
    [
        (Far, bulk_1, Rate, AtLeast(0.50)),
        (Far, bulk_4, Rate, AtLeast(0.33)),
        (Far, bulk_1, Cpu, AtMost(3.5)),
        (Far, bulk_4, Cpu, AtMost(3.5)),
        (Far, keepalive_64, Rate, AtLeast(0.48)),
        (Far, keepalive_1, P50, AtMost(2.0)),
        (Far, keepalive_1, P99, AtMost(3.0)),
        (Far, new_client, Rate, AtLeast(0.60)),
        (Far, new_server, Rate, AtLeast(0.60)),
        (Far, long_client, Rate, AtLeast(0.60)),
        (Far, long_server, Rate, AtLeast(0.60)),
        (Near, bulk_1, Rate, AtLeast(0.80)),
        (Near, bulk_4, Rate, AtLeast(0.80)),
        (Near, keepalive_64, Rate, AtLeast(0.80)),
        (Far, beside, P99, AtMost(5.0)),
        (Far, held, Idle, AtMost(15.0)),
        (Far, held, Memory, AtMost(12.0)),
        (Far, held, Left, AtMost(5.0)),
        (Far, crowd, Time, AtMost(20.0)),
        (Far, remote, Memory, AtMost(30.0)),
    ]
    .map(|(route, load, quantity, bound)| Goal { metric: Metric { route, load, quantity }, bound })
    .into()
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) round: usize,
    pub(crate) route: Route,
    pub(crate) load: Load,
    /// Its place in the list of subjects.
    pub(crate) subject: usize,
}

/// Every load in every round for every subject. Within a round all subjects have their turn at a
/// load before the next load begins; who is first changes from round to round. `has` tells which
/// subjects have what a load needs.
pub(crate) fn steps(
    rounds: usize,
    loads: &[Load],
    subjects: usize,
    has: impl Fn(usize, Route, Load) -> bool,
) -> Vec<Step> {
    let mut steps = Vec::new();
    for round in 0..rounds {
        for &load in loads.iter().filter(|load| round == 0 || !load.is_once()) {
            for route in [Route::Far, Route::Near] {
                for turn in 0..subjects {
                    let subject = (round + turn) % subjects;
                    if load.is_for(route) && has(subject, route, load) {
                        steps.push(Step { round, route, load, subject });
                    }
                }
            }
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_subject_is_first_once_in_as_many_rounds_as_there_are_subjects() {
        let bulk = Load::Bulk { streams: 1 };
        let steps = steps(3, &[bulk], 3, |_, route, _| route == Route::Far);
        let order: Vec<_> = steps.iter().map(|step| step.subject).collect();
        assert_eq!(order, [0, 1, 2, 1, 2, 0, 2, 0, 1]);
    }

    #[test]
    fn a_load_is_measured_on_one_node_where_there_is_a_server_and_a_goal() {
        let steps =
            steps(1, &Load::ALL, 2, |subject, route, _| route == Route::Far || subject == 0);
        let near = steps.iter().filter(|step| step.route == Route::Near);
        let near: Vec<_> = near.map(|step| (step.load.name(), step.subject)).collect();
        let expected = [("bulk-1", 0), ("bulk-4", 0), ("keepalive-64", 0)];
        assert_eq!(near, expected.map(|(name, subject)| (name.to_owned(), subject)));
        for (name, _) in near {
            let name = format!("one-node {name}");
            assert!(goals().iter().any(|goal| goal.metric.name() == name), "{name} has no goal");
        }
        for goal in goals() {
            let Metric { route, load, .. } = goal.metric;
            assert!(load.is_for(route), "{} is never measured", goal.metric.name());
        }
    }

    #[test]
    fn what_takes_long_is_measured_once() {
        let loads = [Load::Sustained { closes: End::Client }, Load::Beside];
        let steps = steps(3, &loads, 1, |_, route, _| route == Route::Far);
        let names: Vec<_> = steps.iter().map(|step| (step.round, step.load.name())).collect();
        let expected = [
            (0, "sustained-client-closes"),
            (0, "beside-bulk"),
            (1, "beside-bulk"),
            (2, "beside-bulk"),
        ];
        assert_eq!(names, expected.map(|(round, name)| (round, name.to_owned())));
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<_> = Load::ALL.iter().map(|load| load.name()).collect();
        assert_eq!(names.len(), Load::ALL.len());
    }
}
