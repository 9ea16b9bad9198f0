package plain

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"web1, 5 µs, 日本":        "web1, 5 µs, 日本",
		"a\nb\r\tc":             "a b  c",
		"\x1b[2J\x00\x7f\u0085": "\uFFFD[2J\uFFFD\uFFFD\uFFFD",
		"user\u202enimda":       "user\uFFFDnimda", // shown as "useradmin"
		"a\u2066b\u200bc\ufeff": "a\uFFFDb\uFFFDc\uFFFD",
		"bad \xff":              "bad \uFFFD",
	} {
		if got := Line(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{"abcd": "abcd", "abcde": "abcd...", "aäää": "aä...", "\x01\x01": "\uFFFD..."} {
		if got := Short(in, 4); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

// Whatever comes in, one bounded line that prints comes out, and what prints is left as it is.
func FuzzShort(f *testing.F) {
	f.Add("a\nb\u202e\xff", 3)
	f.Fuzz(func(t *testing.T, s string, most int) {
		most = max(most%1000, -most%1000)
		got := Short(s, most)
		if len(got) > most+len("...") || !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q is %q", s, got)
		}
		if again := Line(got); again != got {
			t.Errorf("%q once more is %q", got, again)
		}
	})
}
