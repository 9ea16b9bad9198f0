package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func newManCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "man DIR",
		Short: "Write the manual pages into a folder",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("making the folder: %w", err)
			}
			return writeManual(cmd.Root(), args[0])
		},
	}
}

// writeManual writes the page of a command and those of all below it.
func writeManual(c *cobra.Command, dir string) error {
	for _, sub := range c.Commands() {
		if !sub.IsAvailableCommand() || sub.IsAdditionalHelpTopicCommand() {
			continue
		}
		if err := writeManual(sub, dir); err != nil {
			return err
		}
	}
	page, err := manualPage(c)
	if err != nil {
		return err
	}
	name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
	return os.WriteFile(filepath.Join(dir, name), page, 0o644)
}

// noDefault is what the generator writes for flags that are off, or empty, unless somebody says something else.
var noDefault = regexp.MustCompile(`(?m)(\\fB--[a-z0-9-]+\\fP)(\[=false\]|=""|=\[\]|=0)$`)

// manualPage is cobra's, with what is the same for all commands.
func manualPage(c *cobra.Command) ([]byte, error) {
	var page bytes.Buffer
	c.DisableAutoGenTag = true
	if err := doc.GenMan(c, &doc.GenManHeader{Title: "KEYBROKER", Section: "1", Source: "keybroker"}, &page); err != nil {
		return nil, err
	}
	text := noDefault.ReplaceAll(page.Bytes(), []byte("$1"))
	before, after, more := bytes.Cut(text, []byte("\n.SH SEE ALSO\n"))
	text = append(bytes.Clone(before), manualEnd...)
	if more {
		text = append(append(text, "\n.SH SEE ALSO\n"...), after...)
	}
	return text, nil
}

const manualEnd = `
.SH EXIT STATUS
.TP
\fB0\fP
done
.TP
\fB1\fP
failed or refused; of doctor, explain, slot test and audit verify: something is wrong
.TP
\fB2\fP
the command line is wrong

.SH FILES
.TP
\fI/etc/keybroker/broker.toml\fP
how the broker runs; optional (\fB--config\fP)
.TP
\fI/etc/keybroker/policy.toml\fP, \fI/etc/keybroker/policy.d/*.toml\fP
who may have which key (\fB--policy\fP)
.TP
\fI/var/lib/keybroker\fP
realm.json, the realm with its keyslots; state.db, what this host's broker remembers; audit, the audit log; endorsements, certificates for attestation reports
.TP
\fI/run/keybroker\fP
sockets: keybroker.sock for services, admin.sock, hook.sock and unlock.sock
.PP
With \fB--state-dir\fP \fIDIR\fP all of these are below DIR, the sockets in DIR/run.
`
