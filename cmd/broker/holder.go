package main

import (
	"github.com/spf13/cobra"

	"keybroker/derive"
)

func newKeyholderServeCommand(*globals) *cobra.Command {
	return &cobra.Command{
		Use:    "keyholder-serve",
		Short:  "Answer the broker from a filled page (started by the broker alone)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return derive.ServeHolder(derive.HolderPageFD, derive.HolderSocketFD)
		},
	}
}
