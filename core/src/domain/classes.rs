//! Which answers count as errors of a rollout: those with a status of 500 on, unless its file says more.

/// Classes of statuses that count as errors beside 5xx. What never came is an error in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ErrorClasses {
    /// Answers from 400 to 499 count.
    pub client: bool,
    /// Answers from 300 to 399 count.
    pub redirect: bool,
}

impl ErrorClasses {
    /// Returns true when an answer with this status counts as an error. 501 and 505 are answers to a request that nobody
    /// implements, whatever version it meets.
    #[inline]
    pub fn has(self, status: u16) -> bool {
        match status / 100 {
            3 => self.redirect,
            4 => self.client,
            class => class >= 5 && !matches!(status, 501 | 505),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_count_by_their_class() {
        let count = |client, redirect| {
            let classes = ErrorClasses { client, redirect };
            [101, 200, 299, 300, 307, 399, 400, 404, 429, 499, 500, 501, 503, 505, 599]
                .map(|status| u8::from(classes.has(status)))
        };
        assert_eq!(count(false, false), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]);
        assert_eq!(count(true, false), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1]);
        assert_eq!(count(false, true), [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1]);
    }
}
