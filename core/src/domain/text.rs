//! Text that others wrote, bounded before it becomes a reason: reasons are voted on, recorded and sent to every peer.

/// Most characters that are kept of a text from outside.
pub const CHARACTERS_MAX: usize = 500;

/// End of a text that was cut.
pub const CUT: &str = "… (cut at 500 characters)";

/// Returns `text` itself, or its first [`CHARACTERS_MAX`] characters followed by [`CUT`]. Cutting again changes nothing.
pub fn bounded(mut text: String) -> String {
    let Some((end, _)) = text.char_indices().nth(CHARACTERS_MAX) else { return text };
    if &text[end..] != CUT {
        text.truncate(end);
        text.push_str(CUT);
    }
    text
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
}
