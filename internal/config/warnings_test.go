package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A passphrase that everybody may read and an administrator who is not there are legal, and said.
func TestWarnings(t *testing.T) {
	c := Default()
	if w := c.Warnings(); len(w) != 0 {
		t.Errorf("the defaults: %q", w)
	}
	c.PassphraseFile = filepath.Join(t.TempDir(), "pass")
	c.Admin.Users = []string{"root", "0", "54321", "no-such-user"}
	if err := os.WriteFile(c.PassphraseFile, []byte("correct horse"), 0o640); err != nil {
		t.Fatal(err)
	}
	if w := c.Warnings(); len(w) != 1 || !strings.Contains(w[0], `[admin] users: there is no user "no-such-user"`) {
		t.Errorf("%q", w)
	}
	if err := os.Chmod(c.PassphraseFile, 0o644); err != nil {
		t.Fatal(err)
	}
	c.Admin.Users = nil
	if w := c.Warnings(); len(w) != 1 || !strings.HasPrefix(w[0], "passphrase_file: "+c.PassphraseFile+" has mode 0644") {
		t.Errorf("%q", w)
	}
}
