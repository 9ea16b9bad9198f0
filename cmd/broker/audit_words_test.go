package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"keybroker/internal/audit"
)

// A word that no record has finds nothing for ever, which would look like good news.
func TestAuditQueryWords(t *testing.T) {
	s := newAuditedState(t)
	for _, args := range [][2]string{{"--event", "relase"}, {"--tier", "vms"}, {"--decision", "yes"}, {"--code", "No_Policy"}} {
		_, errs, status := s.keybroker(t, "audit", "query", args[0], args[1])
		if status != exitUsage || !strings.Contains(errs, args[0]+": expected ") || !strings.Contains(errs, "got \""+args[1]+"\"") {
			t.Errorf("%q: status %d, %s", args, status, errs)
		}
	}
	out, errs, status := s.keybroker(t, "audit", "query", "--decision", "refused", "--code", "no-policy", "--tier", "service", "--json")
	if status != exitOK || strings.Count(out, "\n") != 1 {
		t.Errorf("status %d, %s%s", status, out, errs)
	}
	source, err := os.ReadFile(filepath.Join(moduleRoot, "internal/audit/record.go"))
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`(?m)^\tEvent\w+ +Event = "([a-z-]+)"`).FindAllStringSubmatch(string(source), -1)
	if len(all) != len(audit.Events()) {
		t.Errorf("%d events of %d are known", len(audit.Events()), len(all))
	}
	for _, m := range all {
		if _, errs, status := s.keybroker(t, "audit", "query", "--event", m[1]); status != exitOK {
			t.Errorf("--event %s: status %d, %s", m[1], status, errs)
		}
	}
}
