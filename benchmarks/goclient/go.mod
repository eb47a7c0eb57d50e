module benchclient

go 1.25
