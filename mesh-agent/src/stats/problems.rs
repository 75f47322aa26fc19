//! The last things that went wrong, as `status` shows them: what was logged as a warning or an
//! error, without repetitions.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use tracing::{Event, Level, Subscriber, field::Field};
use tracing_subscriber::layer::{Context, Layer};

/// How many are kept.
const KEPT: usize = 32;

/// How long the text of one can be, in bytes.
const MAX_TEXT: usize = 512;

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What, in the operator's words.
    pub message: String,
    /// How often.
    pub count: u64,
    /// When first.
    pub first: SystemTime,
    /// When last.
    pub last: SystemTime,
}

/// The last warnings and errors. Cloning shares them; a layer of the agent's log fills them.
#[derive(Clone, Debug, Default)]
pub struct Problems(Arc<Mutex<VecDeque<Problem>>>);

impl Problems {
    /// The latest last.
    pub fn list(&self) -> Vec<Problem> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn record(&self, message: String, now: SystemTime) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().position(|problem| problem.message == message);
        let problem = match known.and_then(|index| kept.remove(index)) {
            Some(problem) => Problem { count: problem.count + 1, last: now, ..problem },
            None => Problem { message, count: 1, first: now, last: now },
        };
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(problem);
    }
}

impl<S: Subscriber> Layer<S> for Problems {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() <= Level::WARN {
            let mut text = Text::default();
            event.record(&mut text);
            self.record(text.finish(), SystemTime::now());
        }
    }
}

/// An event as one line: the message, then the fields in parentheses.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn finish(mut self) -> String {
        if !self.fields.is_empty() {
            let separator = if self.message.is_empty() { "" } else { " " };
            self.message = format!("{}{separator}({})", self.message, self.fields);
        }
        self.message.truncate(self.message.floor_char_boundary(MAX_TEXT));
        self.message
    }

    fn push(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        match field.name() {
            "message" => self.message.push_str(&value.to_string()),
            // Where the `log` crate's records come from.
            name if name.starts_with("log.") => {}
            name => {
                let separator = if self.fields.is_empty() { "" } else { ", " };
                self.fields.push_str(&format!("{separator}{name}: {value}"));
            }
        }
    }
}

impl tracing::field::Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tracing_subscriber::layer::SubscriberExt as _;

    #[test]
    fn warnings_and_errors_are_kept_in_words() {
        let problems = Problems::default();
        let subscriber = tracing_subscriber::registry().with(problems.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("fine");
            tracing::warn!(pod = "u1", tries = 3, "no certificate: {}", "CA away");
            tracing::error!(error = %"x", "broken");
            tracing::warn!(pod = "u1", tries = 3, "no certificate: {}", "CA away");
        });
        let kept: Vec<_> = problems.list().into_iter().map(|p| (p.message, p.count)).collect();
        let expected =
            [("broken (error: x)", 1), ("no certificate: CA away (pod: u1, tries: 3)", 2)];
        assert_eq!(kept, expected.map(|(message, count)| (message.to_owned(), count)));
    }

    #[test]
    fn the_list_is_bounded_and_keeps_the_latest() {
        let problems = Problems::default();
        let start = SystemTime::UNIX_EPOCH;
        for n in 0..100 {
            problems.record(format!("problem {n}"), start + Duration::from_secs(n));
        }
        problems.record("problem 99".to_owned(), start + Duration::from_secs(200));
        let kept = problems.list();
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept[0].message, "problem 68");
        let last = kept.last().unwrap();
        assert_eq!((last.count, last.first), (2, start + Duration::from_secs(99)));
        assert_eq!(last.last, start + Duration::from_secs(200));
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let message = "ä".repeat(MAX_TEXT);
        let text = Text { message, fields: String::new() }.finish();
        assert_eq!(text, "ä".repeat(MAX_TEXT / 2));
    }
}
