//! Text that others wrote, bounded and made visible before it becomes a reason: reasons are voted on, recorded, sent to every peer, and
//! printed on the terminals of operators.

/// Most characters that are kept of a text from outside.
pub const CHARACTERS_MAX: usize = 500;

/// End of a text that was cut.
pub const CUT: &str = "… (cut at 500 characters)";

/// Returns `text` with its hidden characters escaped, or the first [`CHARACTERS_MAX`] characters of that followed by [`CUT`]. Doing it
/// again changes nothing.
pub fn bounded(text: String) -> String {
    let mut text = visible(text);
    let Some((end, _)) = text.char_indices().nth(CHARACTERS_MAX) else { return text };
    if &text[end..] != CUT {
        text.truncate(end);
        text.push_str(CUT);
    }
    text
}

/// Returns true for a character that a terminal obeys instead of showing it: a control character, also of the C1 set, an end of line or
/// of paragraph, and what changes the direction of the text.
pub fn is_hidden(letter: char) -> bool {
    let directs =
        matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    letter.is_control() || directs || matches!(letter, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

/// Returns `text` with each hidden character as people can read it, such as `\n` and `\u{1b}`.
pub fn visible(text: String) -> String {
    if !text.contains(is_hidden) {
        return text;
    }
    let escaped = |letter: char| match is_hidden(letter) {
        true => letter.escape_default().collect::<String>(),
        false => letter.to_string(),
    };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_two_characters_and_says_so() {
        let whole = "é".repeat(CHARACTERS_MAX);
        assert_eq!(bounded(whole.clone()), whole);
        let cut = bounded("é".repeat(60_000));
        assert_eq!(cut, format!("{whole}{CUT}"));
        assert!(CUT.contains(&CHARACTERS_MAX.to_string()), "the mark names the limit");
        assert_eq!(bounded(cut.clone()), cut, "it is not cut twice");
        assert_eq!(bounded(format!("a: {cut}")).chars().count(), CHARACTERS_MAX + CUT.chars().count());
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        let hidden = "\u{1b}[2J\r\n\u{7}\u{9b}31m\u{202e}txt\u{2066}\u{200f}\u{2028}\u{7f}\0\t";
        let shown = visible(hidden.into());
        assert_eq!(shown, "\\u{1b}[2J\\r\\n\\u{7}\\u{9b}31m\\u{202e}txt\\u{2066}\\u{200f}\\u{2028}\\u{7f}\\u{0}\\t");
        assert!(!shown.contains(is_hidden));
        assert_eq!(visible(shown.clone()), shown, "it is not escaped twice");
        assert_eq!(bounded(hidden.into()), shown);
        for plain in ["a b", "é ü 漢字 \u{1f600}", "α spent, 5 % of 20", "… (cut)"] {
            assert_eq!(visible(plain.into()), plain);
        }
        let long = bounded("\u{1b}".repeat(CHARACTERS_MAX));
        assert_eq!(long.chars().count(), CHARACTERS_MAX + CUT.chars().count(), "what is escaped is bounded as well");
    }
}
