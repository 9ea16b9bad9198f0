package policy

import (
	"fmt"
	"strconv"
	"strings"
)

// A setting is one line of an entry in TOML.
type setting struct{ key, value string }

// settings returns the entry's lines, without those that have their default.
func (s *Service) settings() []setting {
	out := []setting{{"name", quote(s.Name)}}
	if s.UIDs != nil {
		out = append(out, setting{"uid", "[" + joinInts(s.UIDs) + "]"})
	}
	if s.Units != nil {
		out = append(out, setting{"unit", "[" + quoteStrings(s.Units) + "]"})
	}
	if via := quoteStrings(s.Via); via != `"unix", "tcp"` {
		out = append(out, setting{"via", "[" + via + "]"})
	}
	return appendLength(out, s.Length)
}

func appendLength(out []setting, n int) []setting {
	if n == defaultLength {
		return out
	}
	return append(out, setting{"length", fmt.Sprint(n)})
}

// settings returns the entry's lines, without those that have their default.
func (v *VM) settings() []setting {
	out := []setting{{"uuid", quote(v.UUID)}}
	if v.Name != "" {
		out = append(out, setting{"name", quote(v.Name)})
	}
	out = append(out, setting{"tier", quote(v.Tier)})
	if v.SNPName != "" {
		out = append(out, setting{"snp", quote(v.SNPName)})
	}
	if v.Shared {
		out = append(out, setting{"shared", "true"})
	}
	if v.Hosts != nil {
		out = append(out, setting{"hosts", "[" + quoteStrings(v.Hosts) + "]"})
	}
	if v.Subject != v.UUID {
		out = append(out, setting{"subject", quote(v.Subject)})
	}
	out = append(out, v.keySettings()...)
	if v.AfterGap != GapAllow {
		out = append(out, setting{"after_gap", quote(v.AfterGap)})
	}
	if v.Deny {
		out = append(out, setting{"deny", "true"})
	}
	return out
}

// keySettings returns keys, and key for those of which there is more to say.
func (v *VM) keySettings() []setting {
	plain, full := []string{}, []string{}
	for _, k := range v.Keys {
		if k.Length == defaultLength && k.LUKS == nil {
			plain = append(plain, k.Name)
		} else {
			full = append(full, inline(k.settings()))
		}
	}
	var out []setting
	if len(plain) > 0 || len(full) == 0 {
		out = append(out, setting{"keys", "[" + quoteStrings(plain) + "]"})
	}
	if len(full) > 0 {
		out = append(out, setting{"key", "[" + strings.Join(full, ", ") + "]"})
	}
	return out
}

func (k Key) settings() []setting {
	out := appendLength([]setting{{"name", quote(k.Name)}}, k.Length)
	if k.LUKS != nil {
		out = append(out, setting{"luks", inline(k.LUKS.settings())})
	}
	return out
}

func (l *LUKS) settings() (out []setting) {
	if l.Cipher != "" {
		out = append(out, setting{"cipher", quote(l.Cipher)})
	}
	if l.KeySize != 0 {
		out = append(out, setting{"key_size", fmt.Sprint(l.KeySize)})
	}
	if l.SectorSize != 0 {
		out = append(out, setting{"sector_size", fmt.Sprint(l.SectorSize)})
	}
	return out
}

func inline(lines []setting) string {
	var out []string
	for _, l := range lines {
		out = append(out, l.key+" = "+l.value)
	}
	return "{ " + strings.Join(out, ", ") + " }"
}

func quote(s string) string { return strconv.Quote(s) }

func quoteStrings(ss []string) string {
	var out []string
	for _, s := range ss {
		out = append(out, quote(s))
	}
	return strings.Join(out, ", ")
}
